"""Tokenizers of checkpoints, by transformers."""

import threading
from pathlib import Path
from typing import Any

from ses_jax.convert.damage import damaged, is_pointer
from ses_jax.convert.files import read_json

__all__ = ["load_tokenizer"]

# What the published checkpoints declare. `AutoTokenizer` comes to the same class, and to any other, but importing it
# imports torch too where that is installed: a second and a half.
DECLARED = {"CLIPTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "T5Tokenizer", "TokenizersBackend"}

_importing = threading.Lock()


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in a folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: naming the folder, if its files can't be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json or tokenizer_config.json")
    try:
        tokenizer = _class_for(folder).from_pretrained(folder, local_files_only=True)
        tokenizer(["a"])  # settings of another kind show when they are used
        return tokenizer
    except Exception as error:  # the library raises anything from OSError to KeyError for damaged files
        if is_pointer(folder / "tokenizer.json"):
            raise damaged(folder / "tokenizer.json", error) from error
        reason = " ".join(str(error).split())[:200]  # it may have all of a file in it
        raise ValueError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _class_for(folder: Path) -> Any:
    """The declared class where nothing else has a say, else `AutoTokenizer`.

    The first import takes a second, and threads that do it at once see half a module.
    """
    declared = _declared(folder)
    with _importing:
        import transformers

        found = declared and getattr(transformers, declared, None)  # releases name them anew
        return found or transformers.AutoTokenizer


def _declared(folder: Path) -> str | None:
    """What a folder says that its tokenizer is, where that is one of `DECLARED`."""
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    config = read_json(folder / "tokenizer_config.json")
    name = str(config.get("tokenizer_class"))
    name = name if name in DECLARED else name.removesuffix("Fast")
    beside = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    return name if name in DECLARED and beside in (None, "clip") and "auto_map" not in config else None
