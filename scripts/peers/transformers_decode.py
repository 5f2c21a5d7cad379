"""The peer's side of `bench_peers.py --peer=transformers`: `generate` of Hugging Face, in the peer's environment.

python transformers_decode.py SPEC.json RESULT.json
"""

import json
import sys
import time

import numpy as np
import torch
import transformers


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    seconds = {}
    for batch in spec["batches"]:
        seconds[batch] = []
        for _ in range(1 + spec["repeats"]):
            prompt_bt = torch.tensor(rng.integers(spec["vocab_size"], size=(batch, spec["prompt_tokens"])))
            start = time.perf_counter()
            with torch.inference_mode():
                token_bt = model.generate(
                    prompt_bt,
                    attention_mask=torch.ones_like(prompt_bt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=spec["new_tokens"],
                    max_new_tokens=spec["new_tokens"],
                    pad_token_id=0,
                )
            seconds[batch].append(time.perf_counter() - start)
            assert token_bt.shape == (batch, spec["prompt_tokens"] + spec["new_tokens"]), token_bt.shape
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with open(sys.argv[2], "w") as file:
        json.dump({"seconds": seconds, "versions": versions, "threads": torch.get_num_threads()}, file)


if __name__ == "__main__":
    main()
