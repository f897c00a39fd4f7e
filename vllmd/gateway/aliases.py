"""From the name in a request to the model that is meant, and never another: what is unknown is told, with the nearest name."""

import difflib
from collections.abc import Mapping

from vllmd.gateway.errors import Trouble
from vllmd.spec import Alias, ModelSpec

LISTED = 20  # names in an error


class Names:
    """All names under which models can be asked for."""

    def __init__(self, models: Mapping[str, ModelSpec]) -> None:
        self._found: dict[str, tuple[ModelSpec, Alias | None]] = {name: (spec, None) for name, spec in models.items()}
        for spec in models.values():
            for alias in spec.aliases:
                self._found.setdefault(alias.name, (spec, alias))

    def find(self, name: str | None) -> tuple[ModelSpec, Alias | None]:
        """The model, and the alias if it was called by one. Raises Trouble: 400 without a name, 404 for an unknown one."""
        if not name:
            raise Trouble(400, "model_missing", 'the request names no model ("model" is missing)', self._known())
        found = self._found.get(name)
        if found is None:
            raise Trouble(404, "model_not_found", f'no model is called "{name[:100]}"', self._nearest(name))
        return found

    def aliases_of(self, model: str) -> list[str]:
        """The further names of a model."""
        return [name for name, (spec, alias) in self._found.items() if alias is not None and spec.name == model]

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name[:100].lower(), self._found, 1, 0.6)
        near = near or [known for known in self._found if len(name) > 2 and name.lower() in known.lower()][:1]
        return f'did you mean "{near[0]}"?' if near else self._known()

    def _known(self) -> str:
        names = list(self._found)
        return "configured: " + (", ".join(names[:LISTED]) + (", ..." if names[LISTED:] else "") if names else "none")
