"""Statuses as a daemon would give them: the drawn example, many models, many devices."""

from typing import Any

GIB = 1 << 30


def model(name: str, state: str = "stopped", **more: Any) -> dict[str, Any]:
    """One object of `models` with every key of the contract; sizes in `more` are GiB."""
    known: dict[str, Any] = {
        "name": name, "model": f"org/{name}", "category": ["ocr"], "state": state, "phase": None, "progress": None,
        "overall": None, "elapsed_s": None, "eta_s": None, "usual_s": None, "silent_s": None, "deadline_s": None,
        "since_s": 0.0, "pid": None, "pids": [], "endpoint": None, "devices": [], "per_device": [], "need": None,
        "reserved": 0, "used": 0, "attempt": 1, "restarts": 0, "uptime_s": None, "requests_running": 0,
        "requests_waiting": 0, "tokens_per_s": 0, "waits_for": None, "why": None,
    }  # fmt: skip
    for size in ("need", "reserved", "used"):
        if size in more:
            more[size] = round(more[size] * GIB)
    device = more.pop("device", "GPU-0")
    if more.get("reserved"):
        more["devices"] = [device]
        more["per_device"] = [{"id": device, "reserved": more["reserved"], "used": more.get("used", 0)}]
    return known | more


def why(short: str, text: str = "", *remedies: str, kind: str = "note") -> dict[str, Any]:
    return {"class": kind, "text": text, "short": short, "remedies": [{"text": r, "action": None} for r in remedies]}


def device(index: int = 0, **more: Any) -> dict[str, Any]:
    """One object of `devices`; sizes in `more` are GiB."""
    known: dict[str, Any] = {
        "id": f"GPU-{index}", "kind": "gpu", "index": index, "name": "NVIDIA RTX 4070", "total": 12.0, "budget": 11.4,
        "reserve": 0.6, "reserved": 0.0, "used": 0.0, "external": 0.0, "free": 11.4, "external_processes": [],
        "silent_s": None,
    }  # fmt: skip
    known |= more
    sizes = ("total", "budget", "reserve", "reserved", "used", "external", "free")
    return known | {size: round(known[size] * GIB) for size in sizes}


def status(models: list[dict[str, Any]], devices: list[dict[str, Any]]) -> dict[str, Any]:
    daemon = {
        "version": "0.1.0", "pid": 812, "host": "ws1", "uptime_s": 3 * 86400.0, "config": "/etc/vllmd/vllmd.toml",
        "access": "admin",
    }  # fmt: skip
    return {"daemon": daemon, "devices": devices, "models": models}


def example() -> dict[str, Any]:
    """Eight models, one in each state but stopping."""
    crash = "crashed 2 min ago: CUDA error: device-side assert triggered"
    context = "max_model_len 32768 needs 4.1 GiB of KV cache, 1.2 GiB is left"
    models = [
        model(
            "dots-ocr", "ready", reserved=6.2, used=5.9, requests_running=3, requests_waiting=2, tokens_per_s=412.0,
            since_s=3 * 86400.0, endpoint="http://127.0.0.1:8000",
        ),
        model(
            "qwen3-vl", "starting", reserved=3.4, used=1.9, requests_waiting=1, since_s=42.0, phase="load",
            progress=0.62, overall=0.43, elapsed_s=42.0, eta_s=55.0, usual_s=58.0,
            why=why("weights 62 %, 55 s left", "loading weights 62 %, 41 s so far, about 55 s left"),
        ),
        model(
            "internvl3", "waiting", need=5.0, requests_waiting=1, since_s=12.0,
            why=why("for 5.0 GiB: chat drains", "waiting for memory: needs 5.0 GiB on GPU 0, 0.3 free"),
        ),
        model(
            "chat", "draining", reserved=0.6, used=0.6, requests_running=2, tokens_per_s=38.0, since_s=2.0,
            why=why("2 left, 28 s at most", "2 requests left, stops in at most 28 s"),
        ),
        model("nanonets-ocr", "asleep", reserved=0.4, used=0.4, since_s=720.0, why=why("wakes in about 3 s")),
        model(
            "bge-m3", "backoff", need=1.0, since_s=120.0,
            why=why("start 3 of 5 in 4 s", crash, "vllmctl logs --failed bge-m3", kind="crashed"),
        ),
        model(
            "got-ocr2", "failed", need=2.2, since_s=540.0,
            why=why(
                "context does not fit", context, "max_model_len = 9584", "vllmctl stop chat nanonets-ocr",
                kind="kv-too-small",
            ),
        ),
        model("smoldocling", "stopped", need=1.3, since_s=7200.0, why=why("idle (ttl 30 min)")),
    ]  # fmt: skip
    xorg = {"pid": 977, "name": "Xorg", "used": round(0.5 * GIB)}
    return status(models, [device(external=0.5, free=0.3, reserved=10.6, used=9.3, external_processes=[xorg])])


def crowd(count: int = 100, cards: int = 8) -> dict[str, Any]:
    """Many models over many devices: 17 up, the rest stopped or in trouble."""
    models = []
    for at in range(count):
        name = f"model-{at:03d}"
        if at % 6 == 0:
            models.append(
                model(
                    name, "ready", reserved=20.0 + at / 10, used=18.0, since_s=at * 100.0, endpoint="unix:/run/x.sock",
                    device=f"GPU-{at // 6 % cards}" if cards else "cpu",
                )
            )  # fmt: skip
        elif at == 7:
            text = "the model's path /models/seven does not exist"
            models.append(model(name, "failed", need=9.0, since_s=60.0, why=why("path is missing", text)))
        else:
            models.append(model(name, need=1.0 + at / 10, since_s=at * 60.0))
    devices = []
    for at in range(cards):
        held = sum(m["reserved"] for m in models if m["devices"] == [f"GPU-{at}"]) / GIB
        card = device(at, name="NVIDIA H200", total=141.0, budget=140.0, reserve=1.0, reserved=held, free=140.0 - held)
        devices.append(card)
    return status(models, devices)
