"""What a training job needs of devices that need not be there: memory, arithmetic, traffic, and the time they allow.

    python scripts/plan.py --model llama3.1-8b --topology v5e:4x4 --mesh 1,4,4

The learner's and the sampler's real programs are compiled from shapes alone. For TPU that takes the `libtpu` package,
which runs on any x86 Linux machine; for `h100:N` JAX's CUDA packages, the extra `cuda12`, and no GPU; for `cpu:N`
nothing else. For other GPUs (`a100:8`), and without those packages, the memory is estimated from shapes; temporaries
are taken to be as those compiled for TPU.

Every figure is read from a compiled program, or is a chip's published limit; none is measured. "At least" is the
longest of arithmetic, memory traffic and collectives at the published peak rates: no real step is faster.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published limits of one chip."""

    memory_bytes: float
    flops: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second, of its memory
    links: float  # bytes a second that it can send to other chips, all links together


# TPU: Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"; of the interchip
# interconnect, which they give for both directions together, the half. v4's page leaves it out: 6 links of 400 Gbit/s
# each way (arXiv:2304.01433). The JAX scaling book (tpus.md) has a tenth less for every generation's links.
# GPU: NVIDIA's figures of A100, H100 and H200 SXM, as quoted by others; half of the bfloat16 figure, which is with
# sparsity, and half of NVLink's, which is of both directions.
CHIPS = {
    "v4": Chip(32e9, 275e12, 1200e9, 300e9),
    "v5e": Chip(16e9, 197e12, 819e9, 200e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip(32e9, 918e12, 1638e9, 400e9),
    "a100": Chip(80e9, 312e12, 2039e9, 300e9),
    "h100": Chip(80e9, 989e12, 3350e9, 450e9),
    "h200": Chip(141e9, 989e12, 4800e9, 450e9),
}


def main() -> None:
    def at_least(low: float, kind: type = int) -> Callable[[str], float]:
        def number(text: str) -> float:
            value = kind(text)
            if not value >= low:
                raise argparse.ArgumentTypeError(f"{text} is less than {low}")
            return value

        return number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a published shape, such as llama3.1-8b (see model/shapes.py)")
    parser.add_argument("--topology", required=True, help="v5e:4x4, v6e:2x2, v5p:2x2x1, ...; cpu:8; h100:1, a100:8")
    parser.add_argument("--mesh", help="data,fsdp,tensor; default: every chip along fsdp")
    parser.add_argument(
        "--blocks", type=at_least(1), help="packed rows of a micro-batch; default: one for each chip of the mesh"
    )
    parser.add_argument(
        "--seq_len", type=at_least(1), default=4096, help="tokens of a packed row, and of a conversation"
    )
    parser.add_argument("--slots", type=at_least(1), default=64, help="sequences decoded together")
    parser.add_argument("--kv_cache_tokens", type=at_least(16), default=65536)
    parser.add_argument("--kl_coef", type=at_least(0, float), default=0.001, help="0 keeps no reference")
    parser.add_argument("--lora_rank", type=at_least(0), default=0)
    parser.add_argument("--offload", choices=("none", "reference", "optimizer", "both"), default="none")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    kind, _, size = args.topology.partition(":")
    if kind not in ("cpu", *CHIPS):
        parser.error(f"no chip is called {kind!r}; known: cpu, {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*" if kind.startswith("v") else r"[1-9]\d*", size):
        parser.error(f"--topology is a chip and how many there are, such as v5e:4x4 or h100:8, not {args.topology!r}")
    chips = math.prod(int(n) for n in size.split("x"))
    if kind == "cpu":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={chips}"
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever this machine has stays free
    if args.mesh and not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", args.mesh):
        parser.error("--mesh is three numbers: data,fsdp,tensor")
    mesh = tuple(int(n) for n in args.mesh.split(",")) if args.mesh else (1, chips, 1)
    if math.prod(mesh) > chips:
        parser.error(f"--mesh has {math.prod(mesh)} chips, and --topology {chips}")

    from agent_lightning.exceptions import AgentLightningError

    try:
        plan = make_plan(args, kind, mesh)
    except AgentLightningError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(plan) if args.json else "\n".join(table(plan)))


def make_plan(args: argparse.Namespace, kind: str, mesh_shape: tuple[int, int, int]) -> dict:
    """Everything, as plain numbers; bytes, FLOPs and seconds are of one chip."""
    import jax
    import ml_collections

    from lightning_jax import aot, gpu, temporaries
    from lightning_jax import mesh as mesh_lib
    from lightning_jax.model.lora import Trainable
    from lightning_jax.model.shapes import named_shape
    from lightning_jax.rl import offload
    from lightning_jax.rl.update import LearnerSettings

    config = named_shape(args.model)
    data, fsdp, tensor = mesh_shape
    axes = ml_collections.ConfigDict({"model": {"fsdp": fsdp, "tensor_parallel": tensor}})
    mesh_lib.sizes_for(config, axes, math.prod(mesh_shape))  # raises where they do not divide the model
    if kind == "cpu":
        mesh = mesh_lib.make_mesh(*mesh_shape)
    elif kind.startswith("v") or (kind == "h100" and gpu.has_compiler()):
        mesh = aot.described_mesh(args.topology, data=data, fsdp=fsdp, tensor=tensor)
    else:
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        mesh = jax.sharding.AbstractMesh(mesh_shape, mesh_lib.AXES, abstract_device=device)
    dtype = "float32" if kind == "cpu" else "bfloat16"
    blocks = args.blocks or data * fsdp
    settings = LearnerSettings(
        kl_coef=args.kl_coef,
        batch_size=blocks,
        max_seq_len=args.seq_len,
        remat="full",
        compute_dtype=dtype,
        offload=args.offload,
        trainable=Trainable(lora_rank=args.lora_rank),
    )
    sampler = aot.SamplerShapes(
        rows=args.slots, length=args.seq_len, num_pages=args.kv_cache_tokens // 16, page_size=16, steps=8, dtype=dtype
    )
    kept = aot.kept_bytes(config, settings, sampler, mesh)
    chip = CHIPS.get(kind)
    plan = {
        "model": args.model,
        "topology": args.topology,
        "mesh": list(mesh_shape),
        "block_tokens": [blocks, args.seq_len],
        "kept_bytes": kept,
        "memory_bytes": chip and chip.memory_bytes,
    }
    programs = {}
    if isinstance(mesh, jax.sharding.Mesh):
        compiled = aot.compile_learner(config, settings, mesh, blocks=blocks, length=args.seq_len)
        compiled |= aot.compile_decode(config, sampler, mesh)
        kernels = aot.kernel_costs(config, sampler, mesh, blocks=blocks, length=args.seq_len)
        programs = {name: program_costs(program, kernels, chip) for name, program in compiled.items()}
    plan["programs"] = programs
    temporary = {name: p["temporary_bytes"] for name, p in programs.items()}
    if not programs:
        temporary["accumulate"] = temporaries.update_bytes(config, settings, args.seq_len, mesh_shape, "gpu")
    plan["temporary_bytes"] = temporary
    hosted = {name: kept[name] for name in offload.parts(settings)} if kind != "cpu" else {}
    plan["hosted_bytes"] = hosted
    on_device = sum(kept.values()) - sum(hosted.values())
    learning = on_device - kept["sampler's weights"]  # they are made again when the update is done
    plan["peak_bytes"] = max(
        on_device - kept["gradients"] + temporary.get("decode", 0),  # those are there for an update only
        learning + max(size for name, size in temporary.items() if name != "decode"),
        learning + hosted.get("optimizer", 0) + temporary.get("apply", 0),  # the optimizer's step
    )
    plan["fits"] = plan["peak_bytes"] <= chip.memory_bytes if chip else None
    return plan


def program_costs(compiled, kernels, chip: Chip | None) -> dict:
    """One program's costs, and the least time that the chip's limits allow."""
    from lightning_jax import hlo_costs

    costs = hlo_costs.of_program(compiled.as_text(), kernels)
    result = {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": costs.flops,
        "bytes_moved": costs.bytes,
        "collectives": {kind: traffic._asdict() for kind, traffic in sorted(costs.collectives.items())},
        "kernels": costs.kernels,
    }
    if chip:
        times = {
            "arithmetic": costs.flops / chip.flops,
            "memory": costs.bytes / chip.bandwidth,
            "collectives": costs.collective_bytes / chip.links,
        }
        limit = max(times, key=times.get)
        result |= {"seconds": times[limit], "limit": limit}
    return result


def table(plan: dict) -> list[str]:
    """The plan for people."""

    def gb(size: float) -> str:
        return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"

    data, fsdp, tensor = plan["mesh"]
    lines = [f"{plan['model']} on {plan['topology']}, data={data} fsdp={fsdp} tensor={tensor}; a chip's share of:"]
    lines += [f"  {name:38}{gb(size):>14}" for name, size in plan["kept_bytes"].items() if size]
    about = "" if plan["programs"] else ", about"
    lines += [f"  {f'temporaries of {n}{about}':38}{gb(size):>14}" for n, size in plan["temporary_bytes"].items()]
    if hosted := plan["hosted_bytes"]:
        name = f"on the host: {' and '.join(hosted)}"
        lines.append(f"  {name:38}{f'-{gb(sum(hosted.values()))}':>14}")
    known = plan["memory_bytes"]
    words = {True: "fits", False: "DOES NOT FIT"}
    verdict = "" if known is None else f" of {gb(known)}: {words[plan['fits']]}"
    lines.append(f"  {'together, at the most':38}{gb(plan['peak_bytes']):>14}{verdict}")
    blocks, length = plan["block_tokens"]
    titles = {
        "accumulate": f"accumulate, a micro-batch of {blocks} x {length} tokens",
        "apply": "apply, one optimizer step",
        "decode": "decode, one token of every slot",
    }
    for name, p in plan["programs"].items():
        lines.append(f"{titles[name]}: {p['flops'] / 1e12:,.3f} TFLOP, {gb(p['bytes_moved'])} moved")
        for kind, traffic in p["collectives"].items():
            lines.append(f"  {kind:20}{traffic['count']:>6} x {gb(traffic['bytes']):>14} sent in all")
        if "seconds" in p:
            lines.append(f"  at least {p['seconds'] * 1e3:,.2f} ms, by {p['limit']}")
    if not plan["programs"]:
        lines.append("GPU programs cannot be compiled without one: arithmetic and traffic are not known")
    return lines


if __name__ == "__main__":
    main()
