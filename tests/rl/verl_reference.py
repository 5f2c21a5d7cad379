"""verl 0.9.1's own functions on cases of ours: `expected()` computes what `verl.npz` holds.

    pip download --no-deps verl==0.9.1 && pip install --no-deps --target FOLDER verl-0.9.1-py3-none-any.whl
    PYTHONPATH=.:FOLDER python tests/rl/verl_reference.py        # writes tests/rl/goldens/verl.npz

verl's `core_algos.py` is run as it is, from its file; the modules that it imports for types alone have stand-ins.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens" / "verl.npz"
AGGREGATIONS = {  # ours: verl's
    "token-mean": "token-mean",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
LOSSES = {"clip": "vanilla", "dual": "vanilla", "gspo": "gspo", "cispo": "cispo"}
KL_ESTIMATORS = ("k1", "k2", "k3", "k3+")
ADVANTAGES = ("grpo", "grpo-none", "rloo", "reinforce++", "reinforce++-baseline")
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, LONGEST, GAMMA, KL_COEF = 0.2, 0.28, 1.5, 40, 0.97, 0.05


def case() -> dict[str, np.ndarray]:
    """13 rollouts of up to 24 tokens, in groups of several sizes: ragged, with observations, one without any token."""
    rng = np.random.default_rng(0)
    n, t = 13, 24
    length_n = rng.integers(6, t + 1, n)
    mask_nt = (np.arange(t) < length_n[:, None]) & (rng.random((n, t)) < 0.75)
    mask_nt[:, 0] = False
    mask_nt[np.arange(n), length_n - 1] = True
    mask_nt[7] = False
    logprob_nt = -rng.exponential(1.0, (n, t))
    arrays = {
        "logprob": logprob_nt,
        "old_logprob": logprob_nt + rng.normal(0, 0.4, (n, t)),
        "reference_logprob": logprob_nt + rng.normal(0, 0.4, (n, t)),
        "advantage": rng.normal(size=(n, t)),
        "weight": rng.uniform(0, 2, (n, t)),
        "reward": np.where(mask_nt & (rng.random((n, t)) < 0.2), rng.normal(size=(n, t)), 0),
    }
    group_n = np.array([0, 1, 0, 2, 1, 0, 2, 2, 1, 3, 3, 0, 2])
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"mask": mask_nt, "group": group_n}


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("verl", "torch"))


def expected() -> dict[str, np.ndarray]:
    """What verl makes of `case()`, by name: values, and gradients by the log-probs."""
    import torch

    verl = _core_algos()
    c = {name: torch.tensor(x) for name, x in case().items()}
    mask_nt = c["mask"].float()
    found = {}

    for name, loss_mode in LOSSES.items():
        config = verl.ActorConfig()
        config.clip_ratio, config.clip_ratio_low, config.clip_ratio_high = None, CLIP_LOW, CLIP_HIGH
        config.clip_ratio_c = DUAL_CLIP if name == "dual" else 1e9
        for ours, theirs in AGGREGATIONS.items():
            config.global_batch_info = {"loss_scale_factor": LONGEST}
            for weighted in ("", "/weighted"):
                logprob_nt = c["logprob"].clone().requires_grad_()
                loss, _ = verl.get_policy_loss_fn(loss_mode)(
                    c["old_logprob"],
                    logprob_nt,
                    c["advantage"],
                    mask_nt,
                    theirs,
                    config,
                    c["weight"] if weighted else None,
                )
                loss.backward()
                found[f"loss/{name}/{ours}{weighted}"] = loss.detach().numpy()
                found[f"gradient/{name}/{ours}{weighted}"] = logprob_nt.grad.numpy()

    for estimator in KL_ESTIMATORS:
        logprob_nt = c["logprob"].clone().requires_grad_()
        kl_nt = verl.kl_penalty(logprob_nt, c["reference_logprob"], estimator)
        (kl_nt * c["advantage"] * mask_nt).sum().backward()
        found[f"kl/{estimator}"], found[f"kl_gradient/{estimator}"] = kl_nt.detach().numpy(), logprob_nt.grad.numpy()

    for name in ADVANTAGES:
        for estimator in (None, *KL_ESTIMATORS[:3]):
            reward_nt = c["reward"].clone()
            if estimator:  # as `apply_kl_penalty` of verl's trainer does
                kl_nt = verl.kl_penalty(c["old_logprob"], c["reference_logprob"], estimator) * mask_nt
                reward_nt = reward_nt - KL_COEF * kl_nt
            options = {"index": case()["group"], "config": types.SimpleNamespace(gamma=GAMMA)}
            if name.startswith("grpo"):
                options["norm_adv_by_std_in_grpo"] = name == "grpo"
            theirs = name.removesuffix("-none").replace("++", "_plus_plus").replace("-", "_")
            advantage_nt, _ = verl.get_adv_estimator_fn(theirs)(reward_nt, mask_nt, **options)
            found[f"advantage/{name}/{estimator}"] = advantage_nt.numpy()
    return {name: x.astype(np.float32) for name, x in found.items()}


def _core_algos() -> types.ModuleType:
    root = Path(importlib.util.find_spec("verl").submodule_search_locations[0])

    def stand_in(name: str, **attributes) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
        return module

    def load(name: str, path: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, root / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    class ActorConfig:
        def get(self, name, default=None):
            return getattr(self, name, default)

    before = dict(sys.modules)
    try:
        stand_in("omegaconf", DictConfig=dict)
        stand_in("tensordict", TensorDict=dict)
        stand_in("verl")
        stand_in("verl.utils.device", get_device_name=lambda: "cpu", get_torch_device=lambda: None)
        stand_in("verl.utils.import_utils", deprecated=lambda _: lambda function: function)
        stand_in("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
        stand_in("verl.workers.config", ActorConfig=ActorConfig)
        utils = stand_in("verl.utils")
        utils.torch_functional = load("verl.utils.torch_functional", "utils/torch_functional.py")
        groupwise = load("verl.utils.groupwise", "utils/groupwise.py")
        utils.as_torch_index, utils.group_mean_std = groupwise.as_torch_index, groupwise.group_mean_std
        return load("verl.trainer.ppo.core_algos", "trainer/ppo/core_algos.py")
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("verl", "omegaconf", "tensordict"):
                del sys.modules[name]


if __name__ == "__main__":
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **expected())
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes")
