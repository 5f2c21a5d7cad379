"""Makes `goldens/`: small random models of every family, written by transformers, with the logits it computes.

    python tests/model/make_goldens.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Needs torch. The folders are what `save_pretrained` writes, so that the tests read real files where torch is missing.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NUM_TOKENS = 48
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {  # wave lengths on both sides of the blend, and in it
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rope_parameters": _rope(10000.0)}),
    "llama3": ("llama", {"rope_parameters": _rope(500000.0), "eos_token_id": [2, 5]}),
    "llama3_scaled": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "smollm2": (
        "llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(100000.0),
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": 8, "rope_parameters": _rope(1000000.0)}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": _rope(1000000.0)}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": _rope(1000000.0)}),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights of trained size: no norm is 1, no bias is 0, and logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.5 if name.endswith("bias") else 1 + noise * 0.2)


def main() -> None:
    for seed, (name, (model_type, changes)) in enumerate(FAMILIES.items()):
        config = transformers.AutoConfig.for_model(model_type, **(SIZES | changes))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        randomize(model, seed)
        model.save_pretrained(GOLDENS / name)
        token_t = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], NUM_TOKENS)
        with torch.no_grad():
            logits_tv = model(torch.tensor(token_t)[None]).logits[0].numpy()
        np.savez_compressed(GOLDENS / name / "logits.npz", token_t=token_t, logits_tv=logits_tv)
    if len(sys.argv) > 1:
        _smollm2(pathlib.Path(sys.argv[1]))


def transformers_gguf(file: pathlib.Path) -> torch.nn.Module:
    """A GGUF file as transformers reads it (`from_pretrained(gguf_file=...)` does this, but wants accelerate)."""
    settings = load_gguf_checkpoint(str(file))["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _smollm2(file: pathlib.Path) -> None:
    """Logits of every 97th id, and over all ids their logsumexp and argmax, for a chat with digits and a turn end."""
    model = transformers_gguf(file)
    token_t = np.array(
        # <|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n
        [1, 4093, 198, 1780, 314, 216, 34, 27, 34, 47, 2, 198, 1, 520, 9531, 198]
    )
    with torch.no_grad():
        logits_tv = model(torch.tensor(token_t)[None]).logits[0]
    np.savez_compressed(
        GOLDENS / "smollm2_135m_q4_1.npz",
        token_t=token_t,
        logits_tv=logits_tv[:, ::97].numpy(),
        logsumexp_t=logits_tv.logsumexp(-1).numpy(),
        argmax_t=logits_tv.argmax(-1).numpy(),
    )


if __name__ == "__main__":
    main()
