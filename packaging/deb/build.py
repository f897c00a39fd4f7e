"""dist/vllmd_VERSION_ARCH.deb from a wheel: build.py WHEEL. No root, no debhelper; needs dpkg-deb and Debian's own Python.

The Python packages that vllmd needs are inside, compiled for the minor version of /usr/bin/python3. For the same inputs
and SOURCE_DATE_EPOCH the result is the same.
"""

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from email import message_from_string
from email.utils import formatdate
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = "/usr/bin/python3"
HOME = "usr/lib/vllmd"
# -I: neither the caller's directory nor its environment; -S: none of the system's Python packages, all is inside.
LAUNCHER = """#!/usr/bin/python3 -IS
import sys

sys.path.insert(0, "/usr/lib/vllmd")
from {module} import main

sys.exit(main())
"""
PROGRAMS = {"vllmd": "vllmd.__main__", "vllmctl": "vllmd.ctl.__main__"}
COPIED = {
    "systemd/vllmd.service": "lib/systemd/system/",
    "systemd/vllmd.socket": "lib/systemd/system/",
    "systemd/vllmd-sweep.service": "lib/systemd/system/",
    "systemd/user/vllmd.service": "usr/lib/systemd/user/",
    "systemd/user/vllmd-sweep.service": "usr/lib/systemd/user/",
    "systemd/vllmd.sysusers": "usr/lib/sysusers.d/vllmd.conf",
    "systemd/vllmd.tmpfiles": "usr/lib/tmpfiles.d/vllmd.conf",
    "etc/vllmd.toml": "etc/vllmd/vllmd.toml",
    "README.md": "usr/share/doc/vllmd/",
    "packaging/deb/lintian-overrides": "usr/share/lintian/overrides/vllmd",
}
SCRIPTS = ("postinst", "prerm", "postrm")
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/vllmctl",
    "zsh": "usr/share/zsh/vendor-completions/_vllmctl",
    "fish": "usr/share/fish/vendor_completions.d/vllmctl.fish",
}
#: Of no use to who runs it: sources of compiled modules, type stubs, tests, and what pip writes for itself.
NOISE = (
    "*.pyx", "*.pxd", "*.pxi", "*.c", "*.h", ".hash", "*.pyi", "py.typed", "tests", "_testcapi*", "example.py", "bin",
)  # fmt: skip
NOISE_INFO = (
    "RECORD", "INSTALLER", "REQUESTED", "WHEEL", "direct_url.json", "top_level.txt", "entry_points.txt", "sboms",
)  # fmt: skip


def run(*argv: str | Path, **env: str) -> str:
    """Its output; ends everything when it fails."""
    done = subprocess.run([*map(str, argv)], env=os.environ | env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"deb: {argv[0]} failed ({done.returncode}); see above")
    return done.stdout.strip()


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def zipped(text: str | bytes) -> bytes:
    """As gzip -9n."""
    return gzip.compress(text.encode() if isinstance(text, str) else text, 9, mtime=0)


def epoch() -> int:
    """The time that all files get: SOURCE_DATE_EPOCH, else that of the last commit, else that of the changelog."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    with contextlib.suppress(OSError, ValueError):
        log = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        return int(subprocess.run(log, capture_output=True, text=True, check=False).stdout)
    return int((ROOT / "CHANGELOG.md").stat().st_mtime)


def install_python(stage: Path, wheel: Path) -> str:
    """vllmd and what it needs, in a directory of its own; returns the oldest libc that all of it runs on."""
    home = stage / HOME
    # pip may be any Python's; --python makes it install for the system's.
    run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "-qq", "--no-compile", "--only-binary=:all:",
        "--disable-pip-version-check", "--root-user-action=ignore", "--target", home, wheel)  # fmt: skip
    libc = max([17, *(lowest_libc(path.read_text()) for path in home.glob("*.dist-info/WHEEL"))])
    doomed = [p for pattern in NOISE for p in home.rglob(pattern)]
    doomed += [p for name in NOISE_INFO for p in home.glob(f"*.dist-info/{name}")]
    for path in doomed:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if strip := shutil.which("strip"):
        run(strip, "--strip-unneeded", *sorted(home.rglob("*.so")))
    # A dependency that pyproject.toml does not name would be missed only at the customer's.
    run(PYTHON, "-ISB", "-c", f"import sys; sys.path.insert(0, {str(home)!r}); import vllmd.daemon, vllmd.ctl.__main__")
    # Never checked against the source and never written again, whoever runs it.
    run(PYTHON, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", stage, "-p", "/", home,
        PYTHONHASHSEED="0")  # fmt: skip
    return f"2.{libc}"


def lowest_libc(wheel: str) -> int:
    """The N of "runs on libc 2.N", from the tags of a wheel; any one of them is enough."""
    return min(map(int, re.findall(r"manylinux_2_(\d+)", wheel)), default=17)


def licences(home: Path) -> str:
    """A paragraph of the copyright file for each Python package inside."""
    out = []
    for path in sorted(home.glob("*.dist-info/METADATA")):
        meta = message_from_string(path.read_text())
        if meta["Name"] == "vllmd-supervisor":
            continue
        classes = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier", []) if c.startswith("License")]
        name = meta["License-Expression"] or " or ".join(classes) or (meta["License"] or "see there").splitlines()[0]
        word = re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-")
        who = meta["Author"] or meta["Author-email"] or meta["Maintainer"] or f"the authors of {meta['Name']}"
        folder = path.parent.name.removesuffix(".dist-info")
        out.append(
            f"Files: {HOME}/{folder.partition('-')[0]}*\nCopyright: {who}\nLicense: {word}\n"
            f" {meta['Name']} {meta['Version']}: {name}. Its text is in /{HOME}/{path.parent.name}.\n"
        )
    return "\n".join(out)


def changelog(version: str, maintainer: str, when: int) -> str:
    """CHANGELOG.md in Debian's form; "Unreleased" is this version."""
    out = []
    for section in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        number = version if title.startswith("Unreleased") else title.strip("[] ").split()[0].strip("[]")
        points = [" ".join(point.split()) for point in ("\n" + body).split("\n- ")[1:]]
        entry = "\n".join(textwrap.fill(p, 78, initial_indent="  * ", subsequent_indent="    ") for p in points)
        date = formatdate(when, usegmt=True).replace("GMT", "+0000")
        out.append(f"vllmd ({number}) unstable; urgency=medium\n\n{entry}\n\n -- {maintainer}  {date}\n")
    return "\n".join(out)


def finish(stage: Path, fields: dict[str, str], when: int) -> None:
    """DEBIAN/, then owners, modes and times that do not depend on who builds."""
    files = sorted(p for p in stage.rglob("*") if p.is_file())
    fields["SIZE"] = str(sum(-(-p.stat().st_size // 1024) for p in files))
    control = (HERE / "control").read_text()
    for name, value in fields.items():
        control = control.replace(f"@{name}@", value)
    sums = "".join(
        f"{hashlib.md5(p.read_bytes()).hexdigest()}  {name}\n"
        for p in files
        if not (name := str(p.relative_to(stage))).startswith("etc/")  # those are the administrator's to change
    )
    write(stage / "DEBIAN/control", control)
    write(stage / "DEBIAN/md5sums", sums)
    write(stage / "DEBIAN/conffiles", "/etc/vllmd/vllmd.toml\n")
    for script in SCRIPTS:
        write(stage / "DEBIAN" / script, (HERE / script).read_bytes())
    for path in (stage, *stage.rglob("*")):
        runs = path.is_dir() or path.parent == stage / "usr/bin" or path.name in SCRIPTS
        path.chmod(0o755 if runs else 0o644)
    (stage / "etc/vllmd/credentials").chmod(0o700)
    for path in (stage, *stage.rglob("*")):
        os.utime(path, (when, when))


def build(wheel: Path) -> Path:
    """The whole package."""
    when = epoch()
    version = re.sub(r"\.?(dev|rc|a|b)(?=\d)", r"~\1", wheel.name.split("-")[1])
    minor = int(run(PYTHON, "-c", "import sys; print(sys.version_info.minor)"))
    arch = run("dpkg", "--print-architecture")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "stage"
        libc = install_python(stage, wheel)
        for source, target in COPIED.items():
            name = target + Path(source).name if target.endswith("/") else target
            write(stage / name, (ROOT / source).read_bytes())
        for name in ("vllmd.toml.d", "credentials"):
            (stage / "etc/vllmd" / name).mkdir()
        for name, module in PROGRAMS.items():
            write(stage / "usr/bin" / name, LAUNCHER.format(module=module))
        inside = {"PYTHONPATH": str(stage / HOME), "SOURCE_DATE_EPOCH": str(when), "PYTHONDONTWRITEBYTECODE": "1"}
        run(PYTHON, ROOT / "packaging/man.py", f"{folder}/man", **inside)
        for page in Path(folder, "man").iterdir():
            write(stage / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz", zipped(page.read_bytes()))
        for shell, target in COMPLETIONS.items():
            write(stage / target, run(PYTHON, "-m", "vllmd.ctl", "completion", shell, **inside) + "\n")
        maintainer = re.search(r"^Maintainer: (.*)$", (HERE / "control").read_text(), re.M)[1]
        doc = stage / "usr/share/doc/vllmd"
        write(doc / "changelog.gz", zipped(changelog(version, maintainer, when)))
        write(doc / "copyright", (HERE / "copyright").read_text() + "\n" + licences(stage / HOME))
        fields = {"VERSION": version, "ARCH": arch, "PYTHON": f"3.{minor}", "NEXT": f"3.{minor + 1}", "LIBC": libc}
        finish(stage, fields, when)
        target = ROOT / "dist" / f"vllmd_{version}_{arch}.deb"
        target.parent.mkdir(exist_ok=True)
        run("dpkg-deb", "--root-owner-group", "--build", stage, target, SOURCE_DATE_EPOCH=str(when))
    return target


if __name__ == "__main__":
    made = build(Path(sys.argv[1]))
    print(f"{made.relative_to(ROOT)}: {made.stat().st_size / 1e6:.1f} MB")
