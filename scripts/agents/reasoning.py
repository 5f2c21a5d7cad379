"""An agent for the procedural, verifiable tasks of the reasoning-gym package (pip install reasoning-gym).

Run as a script it writes tasks, by default sums and differences of two digits:

    python scripts/agents/reasoning.py --output=runs/reasoning --dataset=chain_sum --train=128 --test=32
"""

import argparse
import json
import pathlib
import re

import httpx

INSTRUCTION = "Answer with the result alone."
_http = httpx.Client(timeout=600)


def agent(resource, task) -> float:
    """The reply's score. A task may set fields of the request, as its own `max_tokens`."""
    request = {"model": resource.model_name, "messages": messages(task), "max_tokens": 32} | task.get("request", {})
    response = _http.post(f"{resource.model_api}/chat/completions", json=request)
    response.raise_for_status()
    return score(response.json()["choices"][0]["message"]["content"], task)


def messages(task: dict) -> list[dict[str, str]]:
    """What the model is asked."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": task["question"]}]


def score(reply: str, task: dict) -> float:
    """The score, from 0 to 1, that the task's own verifier gives the reply."""
    import reasoning_gym

    verifier = reasoning_gym.get_score_answer_fn(task["metadata"]["source_dataset"])
    entry = {"question": task["question"], "answer": task["ground_truth"], "metadata": task["metadata"]}
    return float(verifier(answer=extract_answer(reply), entry=entry))


def extract_answer(reply: str) -> str:
    """The last number of the reply, which is how small models end one; the whole reply where there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", reply)
    return numbers[-1].replace(",", "") if numbers else reply.strip()


def write_tasks(folder: pathlib.Path, dataset: str, counts: dict[str, int], options: dict) -> None:
    """Writes FOLDER/train.jsonl and test.jsonl; no question occurs twice in them."""
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    entries = iter(reasoning_gym.create_dataset(dataset, seed=0, size=20 * sum(counts.values()), **options))
    for split, count in counts.items():
        lines = []
        for entry in entries:
            if entry["question"] in seen:
                continue
            seen.add(entry["question"])
            task = {"question": entry["question"], "ground_truth": entry["answer"], "metadata": entry["metadata"]}
            lines.append(json.dumps(task) + "\n")
            if len(lines) == count:
                break
        if len(lines) < count:
            raise SystemExit(f"{dataset} with {options} has only {len(lines)} different tasks left for {split}.jsonl")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tasks of a reasoning-gym dataset.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reasoning"))
    parser.add_argument("--dataset", default="chain_sum")
    parser.add_argument("--train", type=int, default=128)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--options", type=json.loads, help="the dataset's own settings, as a JSON object")
    arguments = parser.parse_args()
    options = arguments.options
    if options is None and arguments.dataset == "chain_sum":
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    write_tasks(arguments.output, arguments.dataset, {"test": arguments.test, "train": arguments.train}, options or {})


if __name__ == "__main__":
    main()
