"""Writes models as ONNX graphs with a key/value cache, for onnxruntime.

The graph is the forward pass of `llama.py`, operator by operator, from the config alone. Inputs and outputs have the
names, shapes and order that optimum gives its "text-generation-with-past" exports, so that what runs those (optimum's
ORTModelForCausalLM, transformers.js, plain onnxruntime) runs these:

    input_ids               [batch, sequence] int64
    attention_mask          [batch, past + sequence] int64, 0 for padding
    position_ids            [batch, sequence] int64
    past_key_values.N.key   [batch, kv_heads, past, head_dim] float32, of layer N; `past` may be 0
    past_key_values.N.value likewise
    -> logits               [batch, sequence, vocabulary] float32
    -> present.N.key        [batch, kv_heads, past + sequence, head_dim], the next call's past
    -> present.N.value      likewise

It is built with the `onnx` package's own helpers rather than traced: a trace holds every weight as a constant of one
protobuf message, which ends at 2 GB, and would have to run where the device is.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model.config import LlamaConfig
from lightning_jax.model.export import whole_folder, write_configs
from lightning_jax.model.llama import Params, rope_frequencies

FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
# A protobuf message ends at 2 GiB, and to write one stops every other thread: measured, 1.1 s for 540 MB.
MAX_INLINE_BYTES = 32_000_000
_OPSET, _IR_VERSION = 18, 8  # of 2022; onnxruntime 1.14 and everything since reads them
_SMALL_BYTES = 1024  # norms and biases stay in the message
_ALIGNMENT = 4096  # so that the data can be mapped into memory


def check_available() -> None:
    """Raises InvalidConfigError where the `onnx` package is missing."""
    _onnx()


def save_onnx(
    folder: str | pathlib.Path, config: LlamaConfig, params: Params, *, max_inline_bytes: int = MAX_INLINE_BYTES
) -> None:
    """Writes `model.onnx`, in float32, and the model's configs; the folder is whole or not there.

    Args:
        folder: as for `export.save_hf`.
        config, params: the model, in the master (stacked) form; JAX or NumPy arrays.
        max_inline_bytes: larger weights go to `model.onnx_data` beside the graph (ONNX external data).

    Raises:
        InvalidConfigError: the `onnx` package is not installed.
    """
    onnx = _onnx()
    total_bytes = 4 * sum(int(np.prod(leaf.shape)) for leaf in _leaves(params))
    with whole_folder(folder) as partial:
        with _Graph(partial / DATA_FILE if total_bytes > max_inline_bytes else None) as graph:
            model = _model(graph, config, params)
        onnx.save(model, partial / FILE)
        write_configs(partial, config, np.dtype(np.float32))


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise InvalidConfigError(
            "the format onnx needs the package onnx, which is not installed where the server runs",
            hint="pip install 'lightning-jax[onnx]' there, or choose the format huggingface or safetensors",
        ) from error
    return onnx


def _leaves(params: Params) -> Iterator[Any]:
    for name, value in params.items():
        yield from value.values() if name == "layers" else (value,)


class _Graph:
    """Nodes and weights of the graph as they are added; each method returns the name of a tensor.

    Args:
        data_path: where large weights are written; None keeps them in the graph.
    """

    def __init__(self, data_path: pathlib.Path | None):
        self._helper, self._onnx = _onnx().helper, _onnx()
        self._data = open(data_path, "wb") if data_path else None
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.float_type: int = self._onnx.TensorProto.FLOAT
        self._scope = ""
        self._constants: dict[tuple, str] = {}

    def __enter__(self) -> "_Graph":
        return self

    def __exit__(self, *_) -> None:
        if self._data is not None:
            self._data.close()

    def scope(self, name: str) -> None:
        """Names what is added from here on."""
        self._scope = name

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Adds an operator with one output, called `out` if that is given."""
        name = f"{self._scope}/{kind}_{len(self.nodes)}"
        output = out or f"{name}_out"
        self.nodes.append(self._helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def halves(self, x: str) -> tuple[str, str]:
        """Splits the last axis in two."""
        name = f"{self._scope}/Split_{len(self.nodes)}"
        outputs = [f"{name}_first", f"{name}_second"]
        self.nodes.append(self._helper.make_node("Split", [x], outputs, name=name, axis=-1, num_outputs=2))
        return outputs[0], outputs[1]

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """A number or a list of numbers."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype)
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(self._onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, value: Any, shape: tuple[int, ...]) -> str:
        """A parameter, as float32 in the given shape."""
        array = np.ascontiguousarray(np.asarray(value).reshape(shape), np.float32)
        if self._data is None or array.nbytes <= _SMALL_BYTES:
            self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
            return name
        self._data.seek(-(-self._data.tell() // _ALIGNMENT) * _ALIGNMENT)
        tensor = self._onnx.TensorProto(name=name, dims=shape, data_type=self._onnx.TensorProto.FLOAT)
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        where = {"location": DATA_FILE, "offset": self._data.tell(), "length": array.nbytes}
        for key, entry in where.items():
            tensor.external_data.add(key=key, value=str(entry))
        array.tofile(self._data)
        self.initializers.append(tensor)
        return name


def _model(g: _Graph, config: LlamaConfig, params: Params) -> Any:
    """The whole graph as an onnx.ModelProto."""
    helper, types = g._helper, g._onnx.TensorProto
    layers = range(config.num_layers)

    def cache(prefix: str, length: str) -> list[Any]:
        shape = ["batch_size", config.num_kv_heads, length, config.head_dim]
        names = [f"{prefix}.{layer}.{part}" for layer in layers for part in ("key", "value")]
        return [helper.make_tensor_value_info(name, types.FLOAT, shape) for name in names]

    total = "past_sequence_length + sequence_length"
    tokens = ["batch_size", "sequence_length"]
    inputs = [
        helper.make_tensor_value_info("input_ids", types.INT64, tokens),
        helper.make_tensor_value_info("attention_mask", types.INT64, ["batch_size", total]),
        helper.make_tensor_value_info("position_ids", types.INT64, tokens),
        *cache("past_key_values", "past_sequence_length"),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", types.FLOAT, [*tokens, config.vocab_size]),
        *cache("present", total),
    ]
    _forward(g, config, params)
    graph = helper.make_graph(g.nodes, config.model_type, inputs, outputs, g.initializers)
    opset = helper.make_opsetid("", _OPSET)
    return helper.make_model(graph, producer_name="lightning-jax", opset_imports=[opset], ir_version=_IR_VERSION)


def _forward(g: _Graph, config: LlamaConfig, params: Params) -> None:
    """`llama.forward` and `llama.unembed`; the axes are its legend's."""
    embed_vd = g.weight("embed_vd", params["embed_vd"], (config.vocab_size, config.hidden_size))
    g.scope("/mask")
    mask = _mask(g, config)
    g.scope("/rope")
    rope = _rope_angles(g, config)
    g.scope("/embed")
    x_btd = g.op("Gather", embed_vd, "input_ids")
    for layer in range(config.num_layers):
        weights = {name: value[layer] for name, value in params["layers"].items()}
        x_btd = _block(g, config, weights, layer, x_btd, rope, mask)
    g.scope("/unembed")
    x_btd = _rms_norm(g, config, x_btd, g.weight("final_norm_d", params["final_norm_d"], (config.hidden_size,)))
    if not config.tie_embeddings:
        unembed_dv = g.weight("unembed_dv", params["unembed_dv"], (config.hidden_size, config.vocab_size))
        g.op("MatMul", x_btd, unembed_dv, out="logits")
        return
    # Gemm alone takes the other operand transposed, so that the embeddings are stored once.
    flat = g.op("Reshape", x_btd, g.constant([-1, config.hidden_size]))
    logits = g.op("Gemm", flat, embed_vd, transB=1)
    batch_and_time = g.op("Shape", "input_ids")
    g.op("Reshape", logits, g.op("Concat", batch_and_time, g.constant([-1]), axis=0), out="logits")


def _mask(g: _Graph, config: LlamaConfig) -> str:
    """Which keys each query sees, [B, 1, 1, T, S] bool: no later ones, no padding, none beyond the sliding window."""
    past = g.op("Gather", g.op("Shape", "past_key_values.0.key"), g.constant(2))
    queries = g.op("Gather", g.op("Shape", "input_ids"), g.constant(1))
    keys = g.op("Add", past, queries)
    one = g.constant(1)
    query_t = g.op("Range", past, keys, one)
    key_s = g.op("Range", g.constant(0), keys, one)
    distance_ts = g.op("Sub", g.op("Unsqueeze", query_t, g.constant([1])), g.op("Unsqueeze", key_s, g.constant([0])))
    visible_ts = g.op("GreaterOrEqual", distance_ts, g.constant(0))
    if config.sliding_window is not None:
        near_ts = g.op("Less", distance_ts, g.constant(config.sliding_window))
        visible_ts = g.op("And", visible_ts, near_ts)
    is_token_bs = g.op("Greater", "attention_mask", g.constant(0))
    return g.op("And", visible_ts, g.op("Unsqueeze", is_token_bs, g.constant([1, 2, 3])))


def _rope_angles(g: _Graph, config: LlamaConfig) -> tuple[str, str]:
    """Sine and cosine of each position's angles, [B, T, h / 2]."""
    position = g.op("Cast", g.op("Unsqueeze", "position_ids", g.constant([2])), to=g.float_type)
    angle = g.op("Mul", position, g.constant(rope_frequencies(config, np), np.float32))
    return g.op("Sin", angle), g.op("Cos", angle)


def _block(
    g: _Graph, config: LlamaConfig, weights: Params, layer: int, x_btd: str, rope: tuple[str, str], mask: str
) -> str:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    d, f, h, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_kv_heads
    heads = config.num_heads

    def weight(name: str, *shape: int) -> str:
        return g.weight(f"layers.{layer}.{name}", weights[name], shape)

    def project(x: str, name: str, bias: str, width: int) -> str:
        y = g.op("MatMul", x, weight(name, d, width))
        return g.op("Add", y, weight(bias, width)) if bias in weights else y

    g.scope(f"/layers.{layer}/attention")
    y_btd = _rms_norm(g, config, x_btd, weight("attn_norm_d", d))
    q = g.op("Reshape", project(y_btd, "q_dkgh", "q_bias_kgh", heads * h), g.constant([0, 0, k, heads // k, h]))
    key = g.op("Reshape", project(y_btd, "k_dkh", "k_bias_kh", k * h), g.constant([0, 0, k, h]))
    value = g.op("Reshape", project(y_btd, "v_dkh", "v_bias_kh", k * h), g.constant([0, 0, k, h]))
    if config.qk_norm:
        q = _rms_norm(g, config, q, weight("q_norm_h", h))
        key = _rms_norm(g, config, key, weight("k_norm_h", h))
    q_bkgth = g.op("Transpose", _rotate(g, q, rope, [2, 3]), perm=[0, 2, 3, 1, 4])
    key = g.op("Transpose", _rotate(g, key, rope, [2]), perm=[0, 2, 1, 3])
    value = g.op("Transpose", value, perm=[0, 2, 1, 3])
    k_bksh = g.op("Concat", f"past_key_values.{layer}.key", key, axis=2, out=f"present.{layer}.key")
    v_bksh = g.op("Concat", f"past_key_values.{layer}.value", value, axis=2, out=f"present.{layer}.value")
    out_btd = _attention(g, q_bkgth, k_bksh, v_bksh, mask, h**-0.5)
    out_btd = g.op("Reshape", out_btd, g.constant([0, 0, heads * h]))
    x_btd = g.op("Add", x_btd, g.op("MatMul", out_btd, weight("o_kghd", heads * h, d)))

    g.scope(f"/layers.{layer}/mlp")
    y_btd = _rms_norm(g, config, x_btd, weight("mlp_norm_d", d))
    gate_btf = g.op("MatMul", y_btd, weight("gate_df", d, f))
    up_btf = g.op("MatMul", y_btd, weight("up_df", d, f))
    silu_btf = g.op("Mul", gate_btf, g.op("Sigmoid", gate_btf))
    return g.op("Add", x_btd, g.op("MatMul", g.op("Mul", silu_btf, up_btf), weight("down_fd", f, d)))


def _attention(g: _Graph, q_bkgth: str, k_bksh: str, v_bksh: str, mask: str, scale: float) -> str:
    """softmax(q k * scale) v where the mask is True; [B, T, K, G, h]."""
    axis = g.constant([2])  # the queries that share a key and value head
    k_bkhs = g.op("Unsqueeze", g.op("Transpose", k_bksh, perm=[0, 1, 3, 2]), axis)
    score_bkgts = g.op("Mul", g.op("MatMul", q_bkgth, k_bkhs), g.constant(scale, np.float32))
    # Not minus infinity: a padded query sees nothing, and its softmax would be NaN.
    lowest = g.constant(np.finfo(np.float32).min, np.float32)
    weight_bkgts = g.op("Softmax", g.op("Where", mask, score_bkgts, lowest), axis=-1)
    out_bkgth = g.op("MatMul", weight_bkgts, g.op("Unsqueeze", v_bksh, axis))
    return g.op("Transpose", out_bkgth, perm=[0, 3, 1, 2, 4])


def _rotate(g: _Graph, x: str, rope: tuple[str, str], heads: list[int]) -> str:
    """Rotates (x[i], x[i + h/2]) by the position's angle i; `heads` are the axes between time and the head's width."""
    sin, cos = (g.op("Unsqueeze", part, g.constant(heads)) for part in rope)
    first, second = g.halves(x)
    turned = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    other = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    return g.op("Concat", turned, other, axis=-1)


def _rms_norm(g: _Graph, config: LlamaConfig, x: str, scale: str) -> str:
    """Root-mean-square norm over the last axis; onnxruntime recognises these operators and merges them."""
    square = g.op("Pow", x, g.constant(2.0, np.float32))
    mean = g.op("ReduceMean", square, g.constant([-1]), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(config.rms_norm_eps, np.float32)))
    return g.op("Mul", g.op("Div", x, root), scale)
