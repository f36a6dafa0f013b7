"""The metadata keys of a GGUF file: their values, which have been read, and the error for an unsupported one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sitelens.errors import SitelensError

GO_ON = "Load the original Hugging Face checkpoint instead"


class Metadata:
    """The metadata of a GGUF file, and which of its architecture's keys have been read."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values = name, values
        self.arch = str(values.get("general.architecture", ""))
        self.unread = {key.removeprefix(f"{self.arch}.") for key in values if key.startswith(f"{self.arch}.")}

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's value for a key, marked as read; a list of equal numbers counts as one number."""
        self.unread.discard(key)
        value = self.values.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]
        if isinstance(value, list):
            raise self.refused(key, value, "is not the same in all layers")
        return value

    def need(self, key: str) -> Any:
        """A required value."""
        if (value := self.get(key)) is None:
            raise SitelensError(f"{self.name} has no metadata {self.arch}.{key}")
        return value

    def refused(self, key: str, value: Any, why: str) -> SitelensError:
        """The error for a key that cannot be honored."""
        shown = f"{str(value)[:60]}..." if len(str(value)) > 60 else value
        return SitelensError(
            f"{self.name}: its metadata {self.arch}.{key} = {shown} {why}: the converted model would compute something "
            f"else. {GO_ON}"
        )
