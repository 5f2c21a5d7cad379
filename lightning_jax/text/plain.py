"""Prompts without a chat: a text or token ids to be written on, under the exact-token rule of `chat.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lightning_jax.text.chat import Prompt, without_end

if TYPE_CHECKING:
    from lightning_jax.text.tokenizer import Tokenizer


class TextCall(Protocol):
    """One earlier call of a rollout.

    Attributes:
        prompt_ids, sampled_ids: as recorded, the id that ended the reply included.
        prompt_text: its prompt, where that was a text; None where it was a chat or token ids.
    """

    prompt_ids: Sequence[int]
    sampled_ids: Sequence[int]
    prompt_text: str | None


def build_plain_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], earlier: Sequence[TextCall]) -> Prompt:
    """Makes the ids of a prompt to be written on.

    A prompt that begins with all of an earlier call, its prompt and what was sampled, is that call's recorded ids and
    the new text's. Where the call had ended with an end-of-sequence id, which a text cannot show, the ids before it are
    gone on from, but no longer as that call. Anything else is encoded as the tokenizer begins a text.

    Args:
        prompt: a text, or token ids, which are taken as they are.
        earlier: the rollout's calls so far.

    Raises:
        ValueError: the prompt has no token.
    """
    if not isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt: there must be at least one token")
        return Prompt(list(prompt), _extended_by_ids(prompt, earlier))
    best, best_text = None, ""
    for index, call in enumerate(earlier):
        if call.prompt_text is not None and len(call.sampled_ids):
            ids, before = without_end(tokenizer, call.sampled_ids), call.prompt_text
            text = before + tokenizer.decode(ids, skip_special=True, continues=bool(before))
            if prompt.startswith(text) and len(text) >= len(best_text):
                best, best_text = index, text
    if best is not None:
        call = earlier[best]
        recorded = [*call.prompt_ids, *without_end(tokenizer, call.sampled_ids)]
        rest = prompt[len(best_text) :]
        ids = recorded + (tokenizer.encode_after(recorded[-1], rest) if rest else [])
        return Prompt(ids, best if call.sampled_ids[-1] not in tokenizer.eos_ids else None)
    ids = tokenizer.encode_beginning(prompt)
    if not ids:
        raise ValueError("prompt: an empty text has no token, and this model's texts begin with none of their own")
    return Prompt(ids, None)


def _extended_by_ids(prompt: Sequence[int], earlier: Sequence[TextCall]) -> int | None:
    best, best_length = None, 0
    for index, call in enumerate(earlier):
        held = [*call.prompt_ids, *call.sampled_ids]
        if len(held) >= best_length and list(prompt[: len(held)]) == held:
            best, best_length = index, len(held)
    return best
