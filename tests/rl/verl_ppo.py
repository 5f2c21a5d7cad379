"""What verl (0.9.1) makes of random token rewards and values: its GAE, and its value loss with its gradient.

    python -m tests.rl.verl_ppo FOLDER_WITH_VERL   # writes goldens/verl_ppo.npz

verl's functions are taken from its source files: importing the package needs a GPU stack.
"""

import ast
import importlib.util
import pathlib
import sys
import types

import numpy as np

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "verl_ppo.npz"
SETTINGS = [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)]  # gamma, lambda
VALUE_CLIP = 0.3


def inputs() -> dict[str, np.ndarray]:
    """6 rows of 40 places, float32: ragged, with observations between sampled tokens, and rewards at sampled ones."""
    rng = np.random.default_rng(7)
    mask_nt = rng.random((6, 40)) < 0.7
    for row, length in enumerate((40, 33, 25, 12, 5, 2)):
        mask_nt[row, length:] = False
    mask_nt[:, 0] = True
    reward_nt = np.where(mask_nt & (rng.random((6, 40)) < 0.2), rng.normal(size=(6, 40)), 0)
    normal = {name: rng.normal(size=(6, 40)) for name in ("value_nt", "new_value_nt", "target_nt")}
    arrays = {name: x.astype(np.float32) for name, x in {"reward_nt": reward_nt, **normal}.items()}
    arrays["new_value_nt"] = arrays["value_nt"] + 0.5 * arrays["new_value_nt"]  # on both sides of the bound
    return arrays | {"mask_nt": mask_nt}


def installed() -> pathlib.Path | None:
    """The folder of an installed verl, which is not imported."""
    spec = importlib.util.find_spec("verl")
    return None if spec is None else pathlib.Path(spec.origin).parent


def outputs(verl: pathlib.Path) -> dict[str, np.ndarray]:
    """verl's, of `inputs`."""
    import torch

    helpers = _functions(verl / "utils/torch_functional.py", {"torch": torch})
    algos = _functions(verl / "trainer/ppo/core_algos.py", {"torch": torch, "verl_F": helpers})
    given = {name: torch.tensor(x) for name, x in inputs().items()}
    mask = given["mask_nt"].float()
    made = {}
    for i, (gamma, gae_lambda) in enumerate(SETTINGS):
        advantages, returns = algos.compute_gae_advantage_return(
            given["reward_nt"], given["value_nt"], mask, gamma, gae_lambda
        )
        made |= {f"advantage_{i}": advantages.numpy(), f"return_{i}": returns.numpy()}
    new_value = given["new_value_nt"].requires_grad_()
    loss, clip_fraction = algos.compute_value_loss(new_value, given["target_nt"], given["value_nt"], mask, VALUE_CLIP)
    loss.backward()
    made |= {"value_loss": loss.detach().numpy(), "clip_fraction": clip_fraction.numpy()}
    return made | {"value_gradient": new_value.grad.numpy()}


def _functions(path: pathlib.Path, names: dict) -> types.SimpleNamespace:
    """The plain functions of a module of verl's, without decorators and annotations, over these global names."""
    wanted = "compute_gae_advantage_return compute_value_loss agg_loss masked_whiten masked_mean masked_sum masked_var "
    wanted += "clip_by_value"
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted.split()]
    for function in functions:
        function.decorator_list, function.returns = [], None
        for argument in ast.walk(function.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    exec(compile(ast.Module(functions, []), str(path), "exec"), names)
    return types.SimpleNamespace(**names)


if __name__ == "__main__":
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **outputs(pathlib.Path(sys.argv[1])))
