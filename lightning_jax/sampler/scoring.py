"""Log-probs of a given sequence, for requests that ask for those of their prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention, llama
from lightning_jax.sampler.request import MAX_TOP_LOGPROBS

_MIN_LENGTH = 64  # sequences are padded to this, or a power of two above it, for few compiled shapes
_CHUNK = 64  # positions whose logits there are at a time


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of a sequence's tokens but the first, which nothing comes before.

    Attributes:
        logprobs: [T - 1] float32, nats, at temperature 1.
        top_ids, top_logprobs: [T - 1, 20] int32 and float32, the likeliest tokens in each one's place.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def score(params: llama.Params, config: llama.LlamaConfig, token_ids: list[int]) -> Scores:
    """Scores a sequence with one forward over it.

    Args:
        params: unstacked, as the sampler has them.
    """
    length = len(token_ids)
    padded = max(_MIN_LENGTH, 1 << (length - 1).bit_length())
    token_bt = np.zeros((1, padded), np.int32)
    token_bt[0, :length] = token_ids
    logprob_t, top_id_tn, top_tn = map(np.asarray, _score(params, token_bt, np.int32(length), config=config))
    return Scores(logprob_t[: length - 1], top_id_tn[: length - 1], top_tn[: length - 1])


@functools.partial(jax.jit, static_argnames="config")
def _score(
    params: llama.Params, token_bt: jax.Array, length: jax.Array, *, config: llama.LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[T], [T, 20], [T, 20]: at each position of the one row about the token that follows it."""
    t = token_bt.shape[1]
    position_bt = jnp.arange(t, dtype=jnp.int32)[None]
    attend = attention.segment_attention((position_bt < length).astype(jnp.int32), position_bt, config.sliding_window)
    x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend)
    target_t = jnp.roll(token_bt[0], -1)

    def chunk(x_and_target: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_cd, target_c = x_and_target
        logprob_cv = jax.nn.log_softmax(llama.unembed(params, config, x_cd))
        top_cn, top_id_cn = jax.lax.top_k(logprob_cv, MAX_TOP_LOGPROBS)
        return jnp.take_along_axis(logprob_cv, target_c[:, None], axis=1)[:, 0], top_id_cn, top_cn

    chunks = (x_btd.reshape(-1, _CHUNK, x_btd.shape[-1]), target_t.reshape(-1, _CHUNK))
    logprob_nc, top_id_nck, top_nck = jax.lax.map(chunk, chunks)
    whole = mesh_lib.constrain  # in every process, for the host
    return (
        whole(logprob_nc.reshape(t), None),
        whole(top_id_nck.reshape(t, -1), None, None),
        whole(top_nck.reshape(t, -1), None, None),
    )
