"""The quickstart's agent: asks the model for a sum, over plain HTTP in the OpenAI wire format, and checks the answer.

Run as a script it writes the tasks again, into the folder `data` beside it.
"""

import json
import pathlib
import random

import httpx

_http = httpx.Client(timeout=60)


def agent(resource, task) -> float:
    """Reward 1 for the right sum, 0 for any other answer."""
    request = {
        "model": resource.model_name,
        "messages": [{"role": "user", "content": task.question}],
        "max_tokens": 8,
    }
    response = _http.post(f"{resource.model_api}/chat/completions", json=request)
    response.raise_for_status()
    answer = response.json()["choices"][0]["message"]["content"]
    return float(answer.strip() == task.ground_truth)


def write_tasks(folder: pathlib.Path, seed: int = 0) -> None:
    """512 training and 128 held-out sums of two numbers from 10 to 99, none in both; 6 of 10 have a carry."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    carry = [pair for pair in pairs if pair[0] % 10 + pair[1] % 10 >= 10]
    plain = [pair for pair in pairs if pair[0] % 10 + pair[1] % 10 < 10]
    for name, count in (("train", 512), ("test", 128)):
        chosen = [carry.pop() if i % 10 < 6 else plain.pop() for i in range(count)]
        rng.shuffle(chosen)
        lines = [json.dumps({"question": f"{a}+{b}=?", "ground_truth": str(a + b)}) + "\n" for a, b in chosen]
        (folder / f"additions_{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write_tasks(pathlib.Path(__file__).parent / "data")
