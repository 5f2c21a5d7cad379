"""An agent of two models: the first finds out where to look, the second makes sense of what is written there.

Whoever looks in the wrong place reads something else, and the first model never sees what is written: a right answer
takes both, and its one reward teaches both. Run as a script it writes the tasks again, into the folder `data` beside
it.
"""

import json
import pathlib
import random

import httpx

_http = httpx.Client(timeout=60)


def agent(resource, task) -> float:
    """Reward 1 for the right answer, 0 for any other."""
    place = ask(resource.model_api_1, task.question)
    return float(ask(resource.model_api_2, written_at(place)) == task.ground_truth)


def ask(model_api: str, question: str) -> str:
    request = {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
    response = _http.post(f"{model_api}/chat/completions", json=request)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"].strip()


def written_at(place: str) -> str:
    """The question that is written in a place, in each another one."""
    return "{}+{}=?".format(*_carrying_pair(random.Random(place)))


def _carrying_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers from 10 to 99 whose sum has a carry."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if a % 10 + b % 10 >= 10:
            return a, b


def write_tasks(folder: pathlib.Path, seed: int = 0) -> None:
    """96 training and 32 held-out tasks, no question in both."""
    rng = random.Random(seed)
    questions: set[tuple[int, int]] = set()
    for name, count in (("train", 96), ("test", 32)):
        lines = []
        while len(lines) < count:
            a, b = _carrying_pair(rng)
            if (a, b) not in questions:
                questions.add((a, b))
                answer = sum(_carrying_pair(random.Random(str(a + b))))
                lines.append(json.dumps({"question": f"{a}+{b}=?", "ground_truth": str(answer)}) + "\n")
        (folder / f"lookup_{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write_tasks(pathlib.Path(__file__).parent / "data")
