"""The update against transformers and torch, and against itself cut into other pieces."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.model import export, weights
from lightning_jax.rl import packing, update
from lightning_jax.rl.learner import Learner, LearnerSettings
from lightning_jax.rl.trajectory import Row

SETTINGS = LearnerSettings(
    learning_rate=1e-3, kl_coef=0.1, entropy_coef=0.02, batch_size=12, max_seq_len=32, min_block_length=32
)


@pytest.fixture(scope="module")
def reference(params):
    """Another policy than `params`, so that the KL term has a gradient."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.02, x.shape).astype(np.float32), params)


def accumulated(config, params, reference, blocks, size, settings=SETTINGS):
    """Totals of packed blocks, accumulated `size` blocks at a time."""
    totals = update.zero_totals(params)
    num_tokens = np.float32(blocks.loss_mask_bt.sum())
    for batch in packing.micro_batches(blocks, size):
        totals = update.accumulate(totals, params, reference, batch, num_tokens, config=config, settings=settings)
    return totals


def assert_equal_gradients(actual, expected, rtol=1e-5):
    """Equal to `rtol` of each parameter's largest gradient."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


def test_gradient_equals_transformers_and_torch(config, params, reference, rows, advantages, tmp_path):
    """The whole objective, each row alone and unpadded, by torch's autograd through transformers' Llama."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def load(name, tree):
        export.save_hf(tmp_path / name, config, tree)
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)

    def logprobs(model, row):
        logits = model(torch.tensor(row.token_ids[None], dtype=torch.long)).logits[0, :-1]
        temperature = torch.tensor(np.where(row.temperature == 0, 1, row.temperature)[1:, None])
        return torch.log_softmax(logits / temperature, dim=-1)

    policy, frozen = load("policy", params), load("reference", reference)
    total, count = 0.0, 0
    for row in rows:
        mask = torch.tensor(row.loss_mask[1:])
        token = torch.tensor(row.token_ids[1:, None], dtype=torch.long)
        all_logprobs = logprobs(policy, row)
        logprob = all_logprobs.gather(1, token)[:, 0]
        log_ratio = logprobs(frozen, row).gather(1, token)[:, 0].detach() - logprob
        ratio = torch.exp(logprob - logprob.detach())
        loss = -ratio * float(advantages[row.rollout_index]) + SETTINGS.kl_coef * (log_ratio.exp() - log_ratio - 1)
        loss = loss + SETTINGS.entropy_coef * (all_logprobs.exp() * all_logprobs).sum(-1)
        total, count = total + loss[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    with torch.no_grad():  # gradients in the weights' place, to be read back as weights are
        for weight in policy.parameters():
            weight.copy_(weight.grad)
    policy.float().save_pretrained(tmp_path / "gradient")
    _, expected = weights.load_model(tmp_path / "gradient")

    totals = accumulated(config, params, reference, packing.pack(rows, advantages, 32), 1)
    np.testing.assert_allclose(totals.sums["loss"], (total / count).item(), rtol=1e-5)
    assert_equal_gradients(totals.grads, expected, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole(config, params, reference, rows, advantages, size):
    blocks = packing.pack(rows, advantages, 32)
    assert blocks.token_bt.shape[0] % 3, "the last micro-batch should have padding"
    whole = accumulated(config, params, reference, blocks, blocks.token_bt.shape[0])
    parts = accumulated(config, params, reference, blocks, size)
    assert_equal_gradients(parts.grads, whole.grads)
    for name in (*update.SUMS, *update.MAXIMA):
        expected, actual = {**whole.sums, **whole.maxima}[name], {**parts.sums, **parts.maxima}[name]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_packed_rows_give_the_logprobs_and_gradient_of_rows_alone(config, params, reference, rows, advantages):
    packed = packing.pack(rows, advantages, 32)
    alone = [packing.pack([row], advantages, 32) for row in rows]
    assert packed.token_bt.shape[0] < len(rows)

    statics = {"config": config, "settings": SETTINGS}
    logprob_bt, entropy_bt = update.policy_logprobs(params, packed, **statics)
    seen = 0
    for block in alone:
        length = int((block.segment_bt > 0).sum())
        expected = update.policy_logprobs(params, block, **statics)
        for b, segment in zip(*np.nonzero((packed.position_bt == 0) & (packed.segment_bt > 0)), strict=True):
            place = (b, slice(segment, segment + length))
            if np.array_equal(packed.token_bt[place], block.token_bt[0, :length]):
                inside = slice(1, length)  # nothing predicts a row's first token
                for actual_bt, expected_bt in zip((logprob_bt, entropy_bt), expected, strict=True):
                    np.testing.assert_allclose(actual_bt[place][inside], expected_bt[0, inside], rtol=1e-5, atol=1e-5)
                seen += 1
    assert seen == len(rows)

    together = accumulated(config, params, reference, packed, 1)
    one_by_one = accumulated(config, params, reference, jax.tree.map(lambda *blocks: np.concatenate(blocks), *alone), 1)
    assert_equal_gradients(together.grads, one_by_one.grads)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(config, params, reference, rows, advantages, remat):
    blocks = packing.pack(rows, advantages, 32)
    settings = dataclasses.replace(SETTINGS, remat=remat)
    plain = accumulated(config, params, reference, blocks, 1)
    assert_equal_gradients(accumulated(config, params, reference, blocks, 1, settings).grads, plain.grads)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_gradients(config, params, rows, advantages):
    settings = dataclasses.replace(SETTINGS, compute_dtype="bfloat16")
    blocks = packing.pack(rows, advantages, 32)
    exact = update.policy_logprobs(params, blocks, config=config, settings=SETTINGS)
    coarse = update.policy_logprobs(params, blocks, config=config, settings=settings)
    for one, other in zip(exact, coarse, strict=True):
        difference = np.abs(one - other)[blocks.loss_mask_bt]
        assert 0 < difference.mean() < 0.02 and difference.max() < 0.2

    arguments = update.zero_totals(params), params, None, blocks, np.float32(1)
    totals = update.accumulate.eval_shape(*arguments, config=config, settings=settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(totals)} == {np.dtype(np.float32)}


def test_optimizer_equals_torch(config, params):
    """Three steps of AdamW with clipping and warm-up on given gradients, by torch."""
    torch = pytest.importorskip("torch")
    settings = dataclasses.replace(SETTINGS, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=2, adam_b2=0.95)
    state = update.init_state(settings, jax.tree.map(jnp.array, params))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(params)]
    decayed = ["norm" not in path for path in paths]
    assert any(decayed) and not all(decayed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p, d in zip(tensors, decayed, strict=True) if d], "weight_decay": 0.1},
            {"params": [p for p, d in zip(tensors, decayed, strict=True) if not d], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    rng = np.random.default_rng(4)
    for step, learning_rate in enumerate((5e-4, 1e-3, 1e-3)):
        grads = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), params)
        totals = dataclasses.replace(update.zero_totals(params), grads=grads)
        state, metrics = update.apply(state, totals, np.float32(1), config=config, settings=settings)
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(tensors, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], learning_rate, rtol=1e-6)
        assert state.step == step + 1
    for path, leaf, tensor in zip(paths, jax.tree.leaves(state.params), tensors, strict=True):
        np.testing.assert_allclose(leaf, tensor.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)


def logprob_sums(learner, rows):
    """Each row's log-prob of its sampled tokens, in the order of `rows`."""
    blocks = [packing.pack([row], np.zeros(12, np.float32), 32) for row in rows]
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    logprob_bt, _ = update.policy_logprobs(learner.state.params, batch, config=learner.config, settings=SETTINGS)
    return np.where(batch.loss_mask_bt, logprob_bt, 0).sum(axis=1)


def test_updates_raise_what_was_rewarded_and_lower_what_was_not(config, params, rows):
    advantage_n = np.array([5, -5] * 6, np.float32)
    learner = Learner(config, params, SETTINGS)
    before = logprob_sums(learner, rows)
    metrics = [learner.update(rows, advantage_n) for _ in range(5)]
    change = logprob_sums(learner, rows) - before
    assert (change * advantage_n > 0).all(), change
    assert metrics[0]["policy/kl"] == 0 < metrics[-1]["policy/kl"]
    assert learner.state.step == 5


def test_the_order_of_rows_and_a_second_run_change_no_bit(config, params, rows, advantages):
    first, second = Learner(config, params, SETTINGS), Learner(config, params, SETTINGS)
    for _ in range(2):
        assert first.update(rows, advantages) == second.update(rows[::-1], advantages)
    jax.tree.map(np.testing.assert_array_equal, first.state, second.state)


def test_steps_micro_batches_and_restored_states_share_their_programs(config, params, rows, advantages):
    """Nothing is compiled after the first update of a shape."""
    settings = dataclasses.replace(SETTINGS, gradient_accumulation=2)
    learner = Learner(config, params, settings)
    learner.update(rows, advantages)
    compiled = update.accumulate._cache_size(), update.apply._cache_size()
    learner.update(rows, advantages)
    shardings = jax.tree.map(lambda x: x.sharding, learner.abstract_state())
    restored = Learner(config, params, settings)
    restored.state = jax.device_put(jax.device_get(learner.state), shardings)  # what a checkpoint gives
    restored.update(rows, advantages)
    assert (update.accumulate._cache_size(), update.apply._cache_size()) == compiled


def test_the_callers_parameters_survive_the_updates(config, params, rows, advantages):
    given = jax.tree.map(jnp.array, params)
    learner = Learner(config, given, SETTINGS)
    learner.update(rows, advantages)
    jax.tree.map(np.testing.assert_array_equal, given, params)


def test_metrics_by_hand(config, params, rows, advantages):
    """The sampler's log-probs set to be 0.25 off on every token but one, which is 1 off."""
    learner = Learner(config, params, dataclasses.replace(SETTINGS, kl_coef=0, entropy_coef=0))
    count = 0
    for row in rows:
        block = packing.pack([row], advantages, 32)
        logprob_bt, _ = update.policy_logprobs(learner.state.params, block, config=config, settings=learner.settings)
        row.sampler_logprob = np.where(row.loss_mask, np.asarray(logprob_bt)[0, : len(row)] + 0.25, 0)
        count += int(row.loss_mask.sum())
    first = np.flatnonzero(rows[0].loss_mask)[0]
    rows[0].sampler_logprob[first] += 0.75

    metrics = learner.update(rows, advantages)
    np.testing.assert_allclose(metrics["policy/sampler_learner_logprob_diff"], 0.25 + 0.75 / count, rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/sampler_learner_logprob_diff_max"], 1, rtol=1e-4)
    # One step on the policy that sampled: the ratio is 1, and the loss is the mean advantage of the tokens.
    weighted = sum(row.loss_mask.sum() * advantages[row.rollout_index] for row in rows)
    np.testing.assert_allclose(metrics["policy/loss"], -weighted / count, rtol=1e-5)
    assert metrics["policy/ratio_mean"] == metrics["policy/ratio_max"] == 1
    assert metrics["policy/clip_fraction"] == 0
    assert "policy/kl" not in metrics
    assert metrics["train/sampled_tokens"] == count
    assert metrics["train/tokens"] == sum(len(row) for row in rows)  # none shares a prompt
    assert 0 < metrics["train/padding_fraction"] < 1


def test_constrained_tokens_are_trained_on_but_not_compared(config, params, rows, advantages):
    settings = dataclasses.replace(SETTINGS, kl_coef=0, entropy_coef=0)
    plain = Learner(config, params, settings).update(rows, advantages)
    constrained = [dataclasses.replace(row, on_policy=~row.loss_mask) for row in rows]
    metrics = Learner(config, params, settings).update(constrained, advantages)
    assert not any("logprob_diff" in name for name in metrics)
    assert metrics == {name: value for name, value in plain.items() if "logprob_diff" not in name}

    constrained[0] = rows[0]
    rows[0].sampler_logprob = rows[0].sampler_logprob - 100.0 * rows[0].loss_mask
    metrics = Learner(config, params, settings).update(constrained, advantages)
    assert 90 < metrics["policy/sampler_learner_logprob_diff"] < 100  # of this row's tokens, not of all


@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_scores_are_those_of_each_row_alone(config, params, rows, optimizer_steps):
    """The last micro-batch of each optimizer step has padding."""
    settings = dataclasses.replace(SETTINGS, optimizer_steps=optimizer_steps, gradient_accumulation=2, batch_size=6)
    learner = Learner(config, params, settings)
    scores = learner.score(rows)
    for row, score in zip(rows, scores, strict=True):
        block = packing.pack([row], np.zeros(12, np.float32), 32)
        expected_bt, _ = update.policy_logprobs(params, block, config=config, settings=SETTINGS)
        np.testing.assert_allclose(score.logprob[1:], expected_bt[0, 1 : len(row)], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(score.reference_logprob, score.logprob)  # nothing was learned yet
    assert learner.score([]) == []


def test_given_log_probs_are_the_old_policys(config, params, rows, advantages):
    learner = Learner(config, params, SETTINGS)
    given = [
        dataclasses.replace(row, old_logprob=score.logprob - 0.1)
        for row, score in zip(rows, learner.score(rows), strict=True)
    ]
    metrics = learner.update(given, advantages)
    np.testing.assert_allclose(metrics["policy/ratio_mean"], np.exp(0.1), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/ratio_max"], np.exp(0.1), rtol=1e-5)


def test_several_optimizer_steps_share_the_log_probs_of_the_first(config, params, rows, advantages):
    """With a large step, the policy of the second half is far from the one that sampled, and the bounds hold it."""
    settings = dataclasses.replace(SETTINGS, learning_rate=0.02, optimizer_steps=2)
    learner = Learner(config, params, settings)
    metrics = learner.update(rows, advantages)
    assert learner.state.step == 2
    assert metrics["policy/ratio_max"] > 1.3
    assert 0 < metrics["policy/clip_fraction"] < 0.6  # the first half has none
    # The comparison with the sampler is made before the first step.
    single = Learner(config, params, SETTINGS).update(rows, advantages)
    diff = "policy/sampler_learner_logprob_diff"
    np.testing.assert_allclose(metrics[diff], single[diff], rtol=1e-4)


def test_more_micro_batches_when_rows_are_more_than_memory_was_planned_for(config, params, rows, advantages):
    def shapes(**changes):
        learner = Learner(config, params, dataclasses.replace(SETTINGS, **changes))
        return [[batch.token_bt.shape for batch in step] for step in learner._divide(rows, advantages)]

    assert shapes() == [[(4, 32)]]
    assert shapes(gradient_accumulation=2) == [[(2, 32)] * 2]
    assert shapes(batch_size=2) == [[(2, 32)] * 2]
    assert shapes(batch_size=2, gradient_accumulation=2) == [[(1, 32)] * 4]
    assert shapes(batch_size=2, max_seq_len=64) == [[(4, 32)]]
    assert shapes(optimizer_steps=2, gradient_accumulation=2) == [[(1, 32)] * 2] * 2
    assert shapes(optimizer_steps=3) == [[(2, 32)]] * 3, "one block, and padding, in two of them"


def test_an_update_takes_as_many_optimizer_steps_as_it_is_asked_for(config, params, rows, advantages, caplog):
    """Four blocks in three parts, whose scores are found again; in five parts there are four, which is said."""
    settings = dataclasses.replace(SETTINGS, kl_coef=0.0, optimizer_steps=3)
    learner = Learner(config, params, settings)
    for ours, whole in zip(learner.score(rows), Learner(config, params, SETTINGS).score(rows), strict=True):
        np.testing.assert_allclose(ours.logprob, whole.logprob, rtol=0, atol=1e-5)
    learner.update(rows, advantages)
    assert learner.state.step == 3 and "optimizer steps" not in caplog.text
    learner = Learner(config, params, dataclasses.replace(settings, optimizer_steps=5))
    learner.update(rows, advantages)
    assert learner.state.step == 4 and "4 optimizer steps in a pass instead of 5" in caplog.text


def test_a_gradient_that_is_not_finite_is_skipped_and_said(config, params, rows, advantages, caplog):
    learner = Learner(config, params, SETTINGS)
    with caplog.at_level(logging.WARNING):
        metrics = learner.update(rows, np.where(np.arange(12) == 3, np.inf, advantages))
    assert metrics["policy/skipped_steps"] == 1
    assert "not finite" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, learner.state.params, params)
    assert learner.update(rows, advantages)["policy/skipped_steps"] == 0


def test_no_rows_no_step(config, params):
    learner = Learner(config, params, SETTINGS)
    assert learner.update([], np.zeros(0, np.float32)) == {"train/tokens": 0, "train/sampled_tokens": 0}
    assert learner.state.step == 0


def test_others_may_use_the_device_after_each_program(config, params, rows, advantages):
    settings = dataclasses.replace(SETTINGS, gradient_accumulation=2)
    turns = []
    learner = Learner(config, params, settings, between=lambda: turns.append(int(learner.state.step)))
    learner.update(rows, advantages)
    assert turns == [0, 0, 1], "after each micro-batch and after the optimizer's step"
    jax.tree.map(
        np.testing.assert_array_equal, learner.state, _updated(Learner(config, params, settings), rows, advantages)
    )


def _updated(learner, rows, advantages):
    learner.update(rows, advantages)
    return learner.state


def test_blocks_are_as_long_as_suits_the_rows(config, params):
    """Eight rows of 300 tokens: one fits a block of 512, and of 320 as well; the update is that of other blocks."""
    rng = np.random.default_rng(5)
    token_nt, logprob_nt = rng.integers(config.vocab_size, size=(8, 300)), -rng.random((8, 300))
    mask_t = np.arange(300) >= 200
    rows = [
        Row(token_t.astype(np.int32), mask_t, (mask_t * logprob_t).astype(np.float32), np.ones(300, np.float32), i)
        for i, (token_t, logprob_t) in enumerate(zip(token_nt, logprob_nt, strict=True))
    ]
    advantages = rng.normal(size=8).astype(np.float32)
    settings = dataclasses.replace(SETTINGS, batch_size=8, max_seq_len=300, min_block_length=256)
    learner = Learner(config, params, settings)
    ((batch,),) = learner._divide(rows, advantages)
    assert batch.token_bt.shape == (8, 320)
    actual = learner.update(rows, advantages)
    expected = Learner(config, params, dataclasses.replace(settings, min_block_length=1024)).update(rows, advantages)
    for metrics in (actual, expected):  # the others are four to a block of 1280
        assert metrics.pop("train/padding_fraction") == pytest.approx(1 - 300 / 320)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rows_are_placed_no_more_often_than_can_pay(config, params, monkeypatch):
    """Where blocks of the first length are nearly full, no other length is tried: only packing places once more."""
    lengths = []

    def place(rows, length, *, share, place=packing.place):
        lengths.append(length)
        return place(rows, length, share=share)

    monkeypatch.setattr(packing, "place", place)
    learner = Learner(config, params, dataclasses.replace(SETTINGS, batch_size=40, max_seq_len=256))

    def divided(num_tokens):
        lengths.clear()
        mask_t = np.arange(num_tokens) >= num_tokens // 2
        nothing_t, ones_t = np.zeros(num_tokens, np.float32), np.ones(num_tokens, np.float32)
        rows = [Row(np.full(num_tokens, i, np.int32), mask_t, nothing_t, ones_t, i) for i in range(32)]
        learner._divide(rows, np.zeros(32, np.float32))
        return lengths

    assert divided(250) == [256, 256]
    assert len(divided(140)) > 2


def test_little_of_a_batch_of_mixed_lengths_is_padding(config, params):
    """Groups of 16 with prompts of 150 to 450 tokens; replies log-normal, half of them longer than 300 tokens."""
    settings = dataclasses.replace(
        SETTINGS, batch_size=512, max_seq_len=2500, min_block_length=256, gradient_accumulation=16
    )
    learner = Learner(config, params, settings)
    padding = []
    for seed in range(4):
        rng, rows = np.random.default_rng(seed), []
        for _ in range(32):
            prompt_t = rng.integers(config.vocab_size, size=rng.integers(150, 450))
            for reply in np.clip(rng.lognormal(np.log(300), 0.6, 16), 4, 2048).astype(int):
                token_t = np.r_[prompt_t, rng.integers(config.vocab_size, size=reply)].astype(np.int32)
                mask_t, nothing_t = np.arange(len(token_t)) >= len(prompt_t), np.zeros(len(token_t), np.float32)
                rows.append(Row(token_t, mask_t, nothing_t, nothing_t + 1, len(rows)))
        (step,) = learner._divide(rows, np.zeros(512, np.float32))
        assert sum(batch.loss_mask_bt.sum() for batch in step) == sum(row.loss_mask.sum() for row in rows)
        padding.append(np.mean([batch.segment_bt == 0 for batch in step]))
    assert np.mean(padding) < 0.05, padding
