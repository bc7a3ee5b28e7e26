"""Notices of a checkpoint's card, its README.md, to those who ask the model."""

from pathlib import Path

CARD = "README.md"
_MAX_LENGTH = 300  # characters of a notice


def notice_of(folder: Path) -> str | None:
    """Return the line of `notice` in the card's front matter, as printable text; None where there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not text.startswith("---\n") or "\nnotice:" not in text:
        return None
    from huggingface_hub import ModelCard  # takes a while, and few cards have a notice

    try:
        notice = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("notice")
    except Exception:  # of YAML's, and of settings that the Hub checks; a card is never in the way
        return None
    if not isinstance(notice, str):
        return None
    return "".join(c if c.isprintable() else " " for c in " ".join(notice.split()))[:_MAX_LENGTH]
