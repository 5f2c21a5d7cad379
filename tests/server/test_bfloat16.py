"""A server that computes in bfloat16, as on accelerators: what it records is what the learner computes."""

import anthropic
import numpy as np
import openai

from lightning_jax import rows
from lightning_jax.model import weights
from lightning_jax.rl import packing, update

USER = [{"role": "user", "content": "2+2?"}]


def test_recorded_log_probs_are_those_of_the_learners_forward(start, random_model):
    """Over conversations of three turns in two dialects, one of them streamed: under 2e-2 nats on average."""
    serving = start(random_model, **{"model.dtype": "bfloat16"})
    job, leases, ids = serving.open(samples=2)
    chat, messages = list(USER), list(USER)
    with openai.OpenAI(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as client:
        for turn in range(3):
            message = client.chat.completions.create(model="m", messages=chat, max_tokens=20).choices[0].message
            chat += [message.model_dump(), {"role": "user", "content": f"Why {turn}?"}]
    with anthropic.Anthropic(base_url=serving.model_api(leases[1]), api_key="x", max_retries=0) as client:
        for turn in range(3):
            with client.messages.stream(model="m", messages=messages, max_tokens=20) as stream:
                content = stream.get_final_message().content
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"Why {turn}?"}]
    records = serving.finish(job, leases, ids)
    made = rows.build(records, np.ones(2, bool))
    assert len(made) == 2 and sum(int(row.loss_mask.sum()) for row in made) == 120
    config, params = weights.load_model(random_model)
    batch = packing.pack(made, np.zeros(2), 256)

    def differences(dtype: str) -> np.ndarray:
        settings = update.LearnerSettings(compute_dtype=dtype)
        logprob_bt, _ = update.policy_logprobs(params, batch, config=config, settings=settings)
        return np.abs(np.asarray(logprob_bt) - batch.sampler_logprob_bt)[batch.loss_mask_bt]

    assert np.mean(differences("bfloat16")) < 2e-2
    assert np.mean(differences("float32")) > 1e-4, "it did not compute in bfloat16"
