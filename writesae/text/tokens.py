"""`tokenizing`: how every command turns text into tokens, and which token it puts before a document."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def tokenizing(tokenizer, bos: bool = True, model=None) -> tuple[Callable[[str], list[int]], int | None]:
    """(text to token ids without special tokens, the token before every document or None).

    Args:
        tokenizer: a Hugging Face tokenizer, or a function from text to token ids.
        bos: put `first_token` before every document.
        model: what the tokens go to; given, `check_vocabulary` is asked first.

    Raises:
        ValueError: see `first_token` and `check_vocabulary`.
    """
    if model is not None:
        check_vocabulary(tokenizer, model)
    call = _call(tokenizer)
    return (lambda text: call(text, False)), (first_token(tokenizer) if bos else None)


def first_token(tokenizer) -> int | None:
    """The token that every command puts before a document.

    It is what the tokenizer itself puts before a text; of one that puts nothing there, its beginning-of-text token;
    of one without such a token (its end of text does not count), none.

    Raises:
        ValueError: the tokenizer puts several tokens before a text.
    """
    if not hasattr(tokenizer, "bos_token_id"):
        return None
    call = _call(tokenizer)
    plain, whole = call("a", False), call("a", True)
    n = len(plain)
    at = next((i for i in range(len(whole) - n + 1) if n and whole[i : i + n] == plain), 0)
    if at > 1:
        raise ValueError(f"tokenizer: expected at most one token before a text, got {whole[:at]}; --no-bos puts none")
    first = whole[0] if at else tokenizer.bos_token_id
    return None if first is None else int(first)


def check_vocabulary(tokenizer, model) -> None:
    """Raises ValueError, naming the token, unless the model embeds every id that the tokenizer can give.

    A function in a tokenizer's place, or a model that does not say what it embeds, is taken at its word.
    """
    size = embedded(model)
    if size is None or not hasattr(tokenizer, "get_vocab"):
        return
    known = {str(token): int(i) for token, i in tokenizer.get_vocab().items()}
    known |= {str(token): int(i) for i, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items()}
    token, highest = max(known.items(), key=lambda item: item[1], default=("", -1))
    if highest >= size:
        raise ValueError(
            f"tokenizer: expected ids below {size}, the tokens the model embeds, got {highest} of {token!r} in a "
            f"vocabulary of {len(known)}: the tokenizer is another model's, or the embedding was not resized"
        )


def check_ids(ids, model) -> None:
    """Raises ValueError unless the model embeds every one of `ids`, an int tensor."""
    size = embedded(model)
    if size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"tokens: expected ids from 0 to {size - 1}, which the model embeds, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )


def embedded(model) -> int | None:
    """How many tokens a model embeds, or None where it does not say."""
    try:
        weight = model.get_input_embeddings()
        return getattr(weight, "num_embeddings", None) or int(weight.weight.shape[0])
    except (AttributeError, NotImplementedError, IndexError, TypeError):
        return None


def _call(tokenizer) -> Callable[[str, bool], list[int]]:
    """(text, with special tokens) to ids, whichever of the arguments of a Hugging Face tokenizer it takes."""
    known = hasattr(tokenizer, "bos_token_id")
    takes = list(inspect.signature(tokenizer.__call__).parameters.values()) if known else []
    # It warns of what is "longer than the model's context", which is cut into passages here.
    quiet = any(p.name == "verbose" or p.kind is p.VAR_KEYWORD for p in takes)
    options = {"verbose": False} if quiet else {}

    def call(text: str, special: bool) -> list[int]:
        found = tokenizer(text, add_special_tokens=special, **options) if known else tokenizer(text)
        return found["input_ids"] if hasattr(found, "keys") else found

    return call
