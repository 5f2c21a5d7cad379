"""Greedy replies of SmolLM2-135M-Instruct as transformers gives them, in float32, one prompt at a time.

    python tests/sampler/make_goldens.py FILE.gguf

writes `goldens/smollm2_greedy.json`. It needs torch and transformers; the tests that read the goldens do not.
"""

import json
import pathlib
import runpy
import sys

import torch

from lightning_jax.text.tokenizer import load_tokenizer

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 16
SYSTEM = "You are a careful assistant. Answer in one short sentence and do not repeat the question."
QUESTIONS = [
    "What is 2+2?",
    "What is 17 * 3?",
    "Name the capital of France.",
    "Name the capital of Japan.",
    "Who wrote Hamlet?",
    "Write a haiku about rain.",
    "List three primary colors.",
    "How many days are in a leap year?",
    "Translate 'good morning' into Spanish.",
    "What does HTTP stand for?",
    "Give me a synonym for 'happy'.",
    "Why is the sky blue?",
]


def questions() -> list[list[dict[str, str]]]:
    """20 conversations: 12 with one system prompt in common, 4 with the template's, 4 of three turns."""
    user = [{"role": "user", "content": question} for question in QUESTIONS]
    system = {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": "I am sorry, I do not know. Is there something else?"}
    return (
        [[system, message] for message in user]
        + [[message] for message in user[:4]]
        + [[first, answer, second] for first, second in zip(user[4:8], user[8:12], strict=True)]
    )


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """`NEW_TOKENS` ids after the prompt, or fewer if the model ends its turn."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor(prompt)[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2
        )
    return ids[0, len(prompt) :].tolist()


def main(file: pathlib.Path) -> None:
    read_gguf = runpy.run_path(str(HERE.parent / "model" / "make_goldens.py"))["transformers_gguf"]
    model, tokenizer = read_gguf(file), load_tokenizer(file)
    prompts = [tokenizer.encode(tokenizer.render(conversation)) for conversation in questions()]
    golden = {"prompts": prompts, "replies": [greedy(model, prompt) for prompt in prompts]}
    (HERE / "goldens" / "smollm2_greedy.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
