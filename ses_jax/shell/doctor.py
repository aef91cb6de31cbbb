"""What this machine has for a search, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub
import jax

PACKAGES = ("ses_jax", "jax", "jaxlib", "flax", "transformers", "huggingface_hub", "numpy", "pillow")
# What it is for, by the module that has to be there.
OPTIONAL = {
    "torch": "reading .bin and .pt files",
    "libtpu": "plan --compile for TPUs: pip install 'ses_jax[tpu]'",
    "jax_cuda12_plugin": "GPUs, and plan --compile for them: pip install 'ses_jax[cuda]'",
}
SECONDS = 3.0


def doctor() -> bool:
    """Prints what there is.

    Returns:
      Whether nothing stands in the way of a search; an unreachable hub does not, as there are local models.
    """
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("caches", _caches()),
        ("hub", [_hub()]),
        ("optional", _optional()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return bool(jax.local_devices())


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is not installed as a package"


def _devices() -> Iterator[str]:
    for device in jax.local_devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        room = f", {memory / 2**30:.1f} GiB for JAX" if memory else ""
        yield f"{device.platform} {device.id}: {device.device_kind}{room}"


def _caches() -> Iterator[str]:
    for name, folder in (("compiled programs", jax.config.jax_compilation_cache_dir), ("models", hub.HF_HUB_CACHE)):
        yield f"{name}: {_size(Path(folder)) if folder else 'none'}"


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}, empty"
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{folder}, {used / 2**30:.2f} GiB, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free"


def _hub() -> str:
    if hub.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    url = urllib.parse.urlsplit(hub.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=SECONDS).close()
    except OSError as error:
        return f"{hub.ENDPOINT} can't be reached ({error}); the demo and local folders work without it"
    return f"{hub.ENDPOINT} can be reached"


def _optional() -> Iterator[str]:
    for module, purpose in OPTIONAL.items():
        yield f"{module}: {'there' if importlib.util.find_spec(module) else 'not there'} ({purpose})"
