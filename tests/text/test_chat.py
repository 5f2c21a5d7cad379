"""Canonical messages and prompts of growing conversations; transformers' rendering of the whole says what is right."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.text import (
    Call,
    Prompt,
    build_continuation,
    build_prompt,
    canonical_messages,
    family_of,
    load_tokenizer,
    parse_reply,
)

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def call(name, arguments, call_id="abcdefgh1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def turn_end(tokenizer):
    """The id with which the template ends a reply: the last of `eos_ids` unless the tokenizer's own eos does."""
    text = tokenizer.render([user("a"), assistant("b")], add_generation_prompt=False).rpartition("b")[2]
    return next(index for index in tokenizer.encode(text.strip()) if index in tokenizer.eos_ids)


def reply_of(tokenizer, ids, tools=None, key=""):
    """The assistant message that a server returns for sampled ids."""
    text = tokenizer.decode(ids, skip_special=True)
    content, calls = parse_reply(text, family_of(tokenizer), key) if tools else (text, [])
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def sample(tokenizer, messages, sampled, tools=None, earlier=(), key=""):
    """One call: the prompt for the messages, and what the model is said to have sampled."""
    prompt = build_prompt(tokenizer, canonical_messages(messages), tools, earlier)
    reply = reply_of(tokenizer, sampled, tools, key)
    return Call(tuple(canonical_messages(messages)), tools, reply, tuple(prompt.ids), tuple(sampled))


# ---- growing conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "truncated"])
def test_faithful_replies_give_the_prompt_of_the_whole_conversation(tokenizer, ended):
    """Where the sampled ids are what encoding the reply gives, nothing can be told from transformers' own prompt."""
    # Llama 2's template writes white space around a reply, so its model samples it, and the server returns it.
    before, after = (" ", " ") if "[/INST] " in tokenizer.render([user("a"), assistant("b")]) else ("", "")
    messages, calls = [user("What is 12 + 30?")], []
    for reply in ("It is 42.", "Because 2+0 = 2\n\nand 1+3 = 4.", "Any time"):
        ids = tokenizer.encode_after(tokenizer.encode("]")[-1], before + reply + (after if ended else ""))
        ids += [turn_end(tokenizer)] if ended else []
        calls.append(sample(tokenizer, messages, ids, earlier=calls))
        messages = [*messages, calls[-1].reply, user(" Why?  ")]
        prompt = build_prompt(tokenizer, canonical_messages(messages), None, calls)
        whole = tokenizer._hf.apply_chat_template(
            [{**message, "content": message["content"].strip()} if message["role"] == "assistant" else message
             for message in messages],
            add_generation_prompt=True, return_dict=False,
        )  # fmt: skip
        assert prompt.ids == whole
        assert prompt.parent == len(calls) - 1


def test_tool_conversation_keeps_every_sampled_id(tokenizer):
    """Six turns with tools: each prompt begins with all that came before, so they train as one row."""
    writes = {
        "hermes": '<tool_call>{{"name":"add",  "arguments":{{"x":{0}}}}}</tool_call>',
        "llama3": '{{"name":"add",  "parameters":{{"x":{0}}}}}',
        "mistral": '[TOOL_CALLS][{{"name":"add",  "arguments":{{"x":{0}}}}}]',
    }
    messages, calls = [user("Add up.")], []
    for turn in range(6):
        text = writes[family_of(tokenizer)].format(turn) if turn % 2 == 0 else f"Now {turn}"
        ids = [*tokenizer.encode(text), turn_end(tokenizer)]
        calls.append(sample(tokenizer, messages, ids, TOOLS, calls, key=str(turn)))
        reply = calls[-1].reply
        assert bool(reply.get("tool_calls")) == (turn % 2 == 0)
        if turn % 2 == 0:
            answer = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": f"result {turn}"}
        else:
            answer = user(f"go on {turn}")
        messages = [*messages, reply, answer]
    for turn in range(1, 6):
        before = [*calls[turn - 1].prompt_ids, *calls[turn - 1].sampled_ids]
        assert list(calls[turn].prompt_ids[: len(before)]) == before
        new = tokenizer.decode(calls[turn].prompt_ids[len(before) :])
        assert (f"result {turn - 1}" if turn % 2 else f"go on {turn - 1}") in new
        assert "Add up" not in new and new.count(f"result {turn - 1}") + new.count(f"go on {turn - 1}") == 1


def test_text_after_a_tool_call_is_what_the_template_writes(tokenizers):
    chatml, llama3, mistral = tokenizers["chatml"], tokenizers["llama3"], tokenizers["mistral"]
    cases = [
        (chatml, '<tool_call>{"name": "add"}</tool_call>',
         "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (llama3, '{"name": "add", "parameters": {}}',
         "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        (mistral, '[TOOL_CALLS][{"name": "add"}]',
         '[TOOL_RESULTS]{"content": 3, "call_id": "ID"}[/TOOL_RESULTS]'),
    ]  # fmt: skip
    for tokenizer, text, expected in cases:
        first = sample(tokenizer, [user("1+2?")], [*tokenizer.encode(text), turn_end(tokenizer)], TOOLS)
        call_id = first.reply["tool_calls"][0]["id"]
        messages = [user("1+2?"), first.reply, {"role": "tool", "tool_call_id": call_id, "content": "3"}]
        prompt = build_prompt(tokenizer, canonical_messages(messages), TOOLS, [first])
        new = prompt.ids[len(first.prompt_ids) + len(first.sampled_ids) :]
        assert prompt.parent == 0 and tokenizer.decode(new) == expected.replace("ID", call_id)


def test_two_calls_in_one_reply_where_the_template_knows_one(tokenizers):
    """Llama 3's templates refuse such a message wherever it stands; the model may have written it all the same."""
    llama3, call_text = tokenizers["llama3"], '{"name": "add", "parameters": {}}'
    messages, calls = [user("1+2?")], []
    for turn, text in enumerate([f"{call_text}; {call_text}", "3 and 3", call_text, "3"]):
        calls.append(sample(llama3, messages, [*llama3.encode(text), turn_end(llama3)], TOOLS, calls, str(turn)))
        made = calls[-1].reply.get("tool_calls", [])
        answers = [{"role": "tool", "tool_call_id": one["id"], "content": f"result {turn}"} for one in made]
        messages = [*messages, calls[-1].reply, *(answers or [user(f"go on {turn}")])]
        assert len(made) == [2, 0, 1, 0][turn]
    for turn in range(1, 4):
        recorded = [*calls[turn - 1].prompt_ids, *calls[turn - 1].sampled_ids]
        assert list(calls[turn].prompt_ids[: len(recorded)]) == recorded
        said = f"go on {turn - 1}" if turn == 2 else f"result {turn - 1}"
        role, times = ("user", 1) if turn == 2 else ("ipython", 2 if turn == 1 else 1)
        one = f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>"
        expected = one * times + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        assert llama3.decode(calls[turn].prompt_ids[len(recorded) :]) == expected


def test_a_truncated_reply_gets_its_turn_end_as_observation(tokenizer):
    first = sample(tokenizer, [user("Tell me")], tokenizer.encode("Once upon a"))
    prompt = build_prompt(tokenizer, canonical_messages([user("Tell me"), first.reply, user("More")]), None, [first])
    recorded = [*first.prompt_ids, *first.sampled_ids]
    assert prompt.ids[: len(recorded)] == recorded
    new = tokenizer.decode(prompt.ids[len(recorded) :]).strip()
    assert new.startswith(tokenizer.decode([turn_end(tokenizer)])) and "More" in new


def test_another_end_than_the_turns_gets_the_turn_end_as_observation(tokenizers):
    """<|endoftext|> also stops the model, but the template's turn is still open."""
    chatml = tokenizers["chatml"]
    first = sample(chatml, [user("a")], [*chatml.encode("b"), 1000])
    prompt = build_prompt(chatml, canonical_messages([user("a"), first.reply, user("c")]), None, [first])
    new = prompt.ids[len(first.prompt_ids) + len(first.sampled_ids) :]
    assert chatml.decode(new) == "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_that_the_template_drops_stay_in_the_prompt(tokenizers):
    chatml = tokenizers["chatml"]
    first = sample(chatml, [user("a")], [*chatml.encode("<think>hm</think>b"), 1001])
    prompt = build_prompt(chatml, canonical_messages([user("a"), first.reply, user("c")]), None, [first])
    assert prompt.parent == 0 and "<think>hm</think>b<|im_end|>\n<|im_start|>user\nc" in chatml.decode(prompt.ids)


def test_a_marker_in_the_conversation_confuses_nothing(tokenizer):
    sampled = [*tokenizer.encode("<think>hm</think>ReplyGoesHere0"), turn_end(tokenizer)]
    first = sample(tokenizer, [user("ReplyGoesHere")], sampled)
    messages = canonical_messages([user("ReplyGoesHere"), first.reply, user("ReplyGoesHere00 x")])
    prompt = build_prompt(tokenizer, messages, None, [first])
    new = tokenizer.decode(prompt.ids[len(first.prompt_ids) + len(first.sampled_ids) :])
    assert prompt.parent == 0 and new.count("ReplyGoesHere") == 1 and "ReplyGoesHere00 x" in new


def test_longest_matching_call_wins(tokenizer):
    end = turn_end(tokenizer)
    first = sample(tokenizer, [user("a")], [*tokenizer.encode("b"), end])
    messages = [user("a"), first.reply, user("c")]
    second = sample(tokenizer, messages, [*tokenizer.encode("d"), end], earlier=[first])
    other = sample(tokenizer, messages, [*tokenizer.encode("e"), end], earlier=[first, second])
    messages = [*messages, assistant("d"), user("f")]
    for calls in ([first, second, other], [second, other, first]):
        assert calls[build_prompt(tokenizer, canonical_messages(messages), None, calls).parent] is second
    messages[3] = assistant("e")
    assert build_prompt(tokenizer, canonical_messages(messages), None, [first, second, other]).parent == 2
    messages[3] = assistant("agent's own words")
    assert build_prompt(tokenizer, canonical_messages(messages), None, [first, second, other]).parent == 0


THOUGHT = "<think>\nso 2\n</think>\n\nFour."


@pytest.mark.parametrize(
    "reply, sent, same",
    [
        (THOUGHT, assistant("<think>\n\nso 2\n\n</think>\n\n\n\nFour."), True),  # Pydantic AI
        (THOUGHT, assistant("\n\nFour.") | {"reasoning_content": "\nso 2\n"}, True),  # LiteLLM
        (THOUGHT, assistant(THOUGHT) | {"reasoning_content": "so 2"}, True),
        ("<think>\n\n</think>\n\nFour.", assistant("\n\nFour.") | {"reasoning_content": "\n\n"}, True),
        (THOUGHT, assistant("Four."), False),
        (THOUGHT, assistant("<think>so 3</think>Four."), False),
        (THOUGHT, assistant("<think>so 2</think>Five."), False),
        (THOUGHT, assistant("Four.") | {"reasoning_content": "so 3"}, False),
        ("Four.", assistant("<think>so 2</think>Four."), False),
    ],
)
def test_a_reply_whose_thought_an_sdk_has_split_off_is_the_same(tokenizers, reply, sent, same):
    tiny = tokenizers["tiny"]
    first = sample(tiny, [user("a")], [*tiny.encode(reply), turn_end(tiny)])
    prompt = build_prompt(tiny, canonical_messages([user("a"), sent, user("c")]), None, [first])
    assert prompt.parent == (0 if same else None)
    if same:
        assert prompt.ids[: len(first.prompt_ids)] == list(first.prompt_ids) and reply in tiny.decode(prompt.ids)


@pytest.mark.parametrize(
    "draft, other",
    [
        ("<think>so 2</think>Four.", "<think>so 2</think>\nFour."),
        ("Four.", "<think>\n\n</think>\n\nFour."),
        ("Four.", "Four.\n"),
    ],
)
def test_of_drafts_that_are_nearly_the_same_the_one_sent_back_is_gone_on_from(tokenizers, draft, other):
    tiny = tokenizers["tiny"]
    calls = [sample(tiny, [user("a")], [*tiny.encode(reply), turn_end(tiny)]) for reply in (draft, other, draft, other)]
    for reply, parent in ((draft, 2), (other, 3)):
        sent = [user("a"), assistant(reply)]
        assert build_prompt(tiny, canonical_messages([*sent, user("c")]), None, calls).parent == parent
        continued = build_continuation(tiny, canonical_messages(sent), None, calls).ids
        assert continued == [*calls[parent].prompt_ids, *calls[parent].sampled_ids[:-1]]


def test_white_space_that_is_added_to_a_thoughtful_reply_is_written_on(tokenizers):
    tiny = tokenizers["tiny"]
    first = sample(tiny, [user("a")], tiny.encode("<think>x</think>\n\nHello"))
    sent = canonical_messages([user("a"), assistant("<think>x</think>\n\nHello\n\n")])
    prompt = build_continuation(tiny, sent, None, [first])
    assert prompt.parent is None and tiny.decode(prompt.ids).endswith("Hello\n\n")


@pytest.mark.parametrize(
    "messages, tools",
    [
        ([user("a!"), assistant("b"), user("c")], None),
        ([user("a"), assistant("b "), user("c")], None),
        ([user("a"), assistant("b"), user("c")], TOOLS),
        ([user("a")], None),
        ([user("c")], None),
    ],
    ids=["prompt", "reply", "tools", "same prompt", "other prompt"],
)
def test_a_rewritten_history_is_encoded_afresh(tokenizers, messages, tools):
    for name in ("tiny", "chatml", "llama3", "smollm2"):
        tokenizer = tokenizers[name]
        first = sample(tokenizer, [user("a")], [*tokenizer.encode("b"), turn_end(tokenizer)])
        prompt = build_prompt(tokenizer, canonical_messages(messages), tools, [first])
        assert prompt.parent is None and prompt.ids == tokenizer.encode(tokenizer.render(messages, tools))


def test_a_reply_without_the_white_space_around_it_is_the_same(tokenizers):
    """LangChain's Anthropic client, for one, strips what it sends back."""
    tiny = tokenizers["tiny"]
    first = sample(tiny, [user("a")], [*tiny.encode("\n b \n"), turn_end(tiny)])
    for text in ("\n b \n", "b", "\n b"):
        assert (
            build_prompt(tiny, canonical_messages([user("a"), assistant(text), user("c")]), None, [first]).parent == 0
        )
    assert build_prompt(tiny, canonical_messages([user("a"), assistant(" b"), user("c")]), None, [first]).parent is None


def test_a_reply_is_written_on(tokenizers):
    """A reply that was cut off goes on from its ids; one that had ended, without that end; new words are encoded."""
    for name in ("tiny", "chatml", "llama3"):
        tokenizer = tokenizers[name]
        ids = [tokenizer.encode("b")[0], tokenizer.encode("c")[0]]
        cut = sample(tokenizer, [user("a")], ids)
        messages = canonical_messages([user("a"), assistant("bc")])
        whole = [*cut.prompt_ids, *cut.sampled_ids]
        assert build_continuation(tokenizer, messages, None, [cut]) == Prompt(whole, 0)
        ended = sample(tokenizer, [user("a")], [*ids, turn_end(tokenizer)])
        assert build_continuation(tokenizer, messages, None, [ended]) == Prompt(whole, None)
        fresh = build_continuation(tokenizer, canonical_messages([user("a"), assistant("Well, ")]), None, [cut])
        rendered = tokenizer.render([user("a")], None)
        assert fresh.parent is None and tokenizer.decode(fresh.ids) == tokenizer.decode(
            tokenizer.encode(rendered + "Well, ")
        )
    with pytest.raises(ValueError, match="last message"):
        build_continuation(tokenizers["tiny"], canonical_messages([user("a")]), None, [])


def test_what_a_stop_string_hid_is_not_written_on(tokenizers):
    """Sampled, but no part of the reply: the agent asks to go on from the text before it."""
    tiny = tokenizers["tiny"]
    prompt = build_prompt(tiny, canonical_messages([user("a")]), None, []).ids
    sampled = tiny.encode(" look\nObservation:")
    cut = Call(tuple([user("a")]), None, assistant(" look"), tuple(prompt), tuple(sampled))
    for text in (" look", "look"):
        written_on = build_continuation(tiny, canonical_messages([user("a"), assistant(text)]), None, [cut])
        assert written_on == Prompt(prompt + tiny.encode_after(prompt[-1], text), None)
    whole = Call(tuple([user("a")]), None, assistant(" look\nObservation:"), tuple(prompt), tuple(sampled))
    for text in (" look\nObservation:", "look\nObservation:"):
        written_on = build_continuation(tiny, canonical_messages([user("a"), assistant(text)]), None, [cut, whole])
        assert written_on == Prompt(prompt + sampled, 1)


def test_a_reply_in_parts_is_the_text_that_was_sampled(tokenizers):
    """As LangChain sends back what it has streamed from the Responses API."""
    chatml = tokenizers["chatml"]
    first = sample(chatml, [user("Tell me")], [*chatml.encode("one and two"), turn_end(chatml)])
    parts = [{"type": "text", "text": text} for text in ("one ", "and two")]
    messages = canonical_messages([user("Tell me"), {"role": "assistant", "content": parts}, user("More")])
    assert build_prompt(chatml, messages, None, [first]).parent == 0


def test_an_agents_spelling_of_the_reply_still_matches(tokenizers):
    """SDKs send a reply back with None, parts, other JSON spacing and empty fields; it is the same reply."""
    tiny = tokenizers["tiny"]
    text = '<tool_call>{"name": "add", "arguments": {"x":1,"y":"é"}}</tool_call>'
    first = sample(tiny, [user("a")], [*tiny.encode(text), turn_end(tiny)], TOOLS)
    call_id = first.reply["tool_calls"][0]["id"]
    echoed = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "function_call": None,
        "tool_calls": [call("add", '{"x":1, "y":"\\u00e9"}', call_id)],
    }  # fmt: skip
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    answer = {"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": "3"}]}
    assert build_prompt(tiny, canonical_messages([parts, echoed, answer]), TOOLS, [first]).parent == 0


@pytest.mark.parametrize("arguments", ['{"a": 2, "b"', "{}", {"a": 2}, '{"INVALID_JSON": "{\\"a\\": 2, \\"b\\""}'])
def test_a_call_that_was_cut_short_comes_back_as_an_sdk_mends_it(tokenizers, arguments):
    tiny = tokenizers["tiny"]
    prompt, sampled = tiny.encode("<|user|>a<|end|><|assistant|>"), tiny.encode('<tool_call>\n{"name": "add", ')
    reply = assistant("") | {"tool_calls": [call("add", '{"a": 2, "b"')]}
    cut = Call((user("a"),), TOOLS, reply, tuple(prompt), tuple(sampled))

    def parent_of(made):
        answer = {"role": "tool", "tool_call_id": made["id"], "content": "3"}
        messages = [user("a"), assistant(None) | {"tool_calls": [made]}, answer]
        return build_prompt(tiny, canonical_messages(messages), TOOLS, [cut]).parent

    assert parent_of(call("add", arguments)) == 0
    assert parent_of(call("sub", arguments)) is None and parent_of(call("add", arguments, "other")) is None


def answered(made):
    return {"role": "tool", "tool_call_id": made["id"], "content": "3"}


@pytest.mark.parametrize("name", ["tiny", "smollm2", "chatml", "llama2", "llama3"])
def test_calls_of_one_reply_that_come_back_one_by_one(tokenizers, name):
    """openai-agents sends each with its result to models with Claude's or Gemini's name."""
    tokenizer = tokenizers[name]
    writes = {
        "hermes": 'Both.<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "add"}</tool_call>',
        "llama3": '{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}',
    }
    sampled = [*tokenizer.encode(writes[family_of(tokenizer)]), turn_end(tokenizer)]
    together, apart = [user("1+2?")], [user("1+2?")]
    calls, expected = [], []
    for turn in range(3):
        calls.append(sample(tokenizer, apart, sampled, TOOLS, calls, key=str(turn)))
        expected.append(sample(tokenizer, together, sampled, TOOLS, expected, key=str(turn)))
        reply = calls[-1].reply
        one, two = reply["tool_calls"]
        together += [reply, answered(one), answered(two)]
        apart += [reply | {"tool_calls": [one]}, answered(one), assistant(None) | {"tool_calls": [two]}, answered(two)]
        prompt = build_prompt(tokenizer, canonical_messages(apart), TOOLS, calls)
        assert prompt.parent == turn
        assert prompt == build_prompt(tokenizer, canonical_messages(together), TOOLS, expected)


def test_calls_that_are_not_of_one_reply_stay_apart(tokenizers):
    tiny = tokenizers["tiny"]
    sampled = [*tiny.encode('<tool_call>{"name": "add"}</tool_call>'), turn_end(tiny)]
    messages, calls = [user("a")], []
    for turn in range(3):
        calls.append(sample(tiny, messages, sampled, TOOLS, calls, key=str(turn)))
        messages += [calls[-1].reply, answered(calls[-1].reply["tool_calls"][0])]
        assert build_prompt(tiny, canonical_messages(messages), TOOLS, calls).parent == turn
    fresh = canonical_messages(messages)
    assert build_prompt(tiny, fresh, TOOLS, []).ids == tiny.encode(tiny.render(fresh, TOOLS))
    both = sample(tiny, [user("b")], [*sampled[:-1], *sampled], TOOLS)
    one, two = both.reply["tool_calls"]
    halves = [assistant(None) | {"tool_calls": [one]}, answered(one), assistant(None) | {"tool_calls": [two]}]
    between = canonical_messages([user("b"), *halves[:2], user("Well?"), halves[2], answered(two)])
    assert build_prompt(tiny, between, TOOLS, [both]).parent is None


# ---- the exact-token rule -------------------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab1 é\n<|>_日🤖"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_prompts_begin_with_the_recorded_ids(tokenizers, data):
    """Whatever was sampled, also ids that decoding and encoding would change, stands in every later prompt."""
    name = data.draw(st.sampled_from(sorted(tokenizers)))
    tokenizer = tokenizers[name]
    any_id = st.integers(0, tokenizer.vocab_size - 1).filter(lambda index: index not in tokenizer.eos_ids)
    messages, calls, changed = [user(data.draw(words))], [], False
    for _ in range(data.draw(st.integers(1, 4))):
        ids = data.draw(st.lists(any_id, min_size=1, max_size=12))
        changed |= tokenizer.encode(tokenizer.decode(ids)) != ids
        ids += [data.draw(st.sampled_from(tokenizer.eos_ids))] if data.draw(st.booleans()) else []
        prompt = build_prompt(tokenizer, canonical_messages(messages), None, calls)
        reply = reply_of(tokenizer, ids)
        calls.append(Call(tuple(canonical_messages(messages)), None, reply, tuple(prompt.ids), tuple(ids)))
        messages = [*messages, reply, user(data.draw(words))]
        after = build_prompt(tokenizer, canonical_messages(messages), None, calls)
        recorded = prompt.ids + ids
        assert after.ids[: len(recorded)] == recorded
        assert after.parent == len(calls) - 1
        # The new text is the template's: the end of the turn unless it was sampled, then the user's message.
        new = tokenizer.decode(after.ids[len(recorded) :])
        expected = tokenizer.render([*messages[:-2], assistant("Reply"), messages[-1]]).rpartition("Reply")[2]
        end = tokenizer.decode([turn_end(tokenizer)])
        assert new.lstrip().startswith(end) == (ids[-1] != turn_end(tokenizer))
        expected = expected if new.lstrip().startswith(end) else expected.lstrip().removeprefix(end)
        assert "".join(new.split()) == "".join(expected.split())  # SentencePiece shows spaces it put in itself
    assume(changed)


def test_ids_that_do_not_survive(tokenizers):
    """The same with ids known not to survive: a word cut where its own tokenizer would not cut it, and broken UTF-8."""
    for name, tokenizer in tokenizers.items():
        ids = [tokenizer.encode("t")[-1], tokenizer.encode("h")[-1], tokenizer.encode("é")[-1]]
        ids = ids[:2] if name == "smollm2" else ids
        if name == "tiny":
            ids = tokenizer.encode("é")[:1]
        assert tokenizer.encode(tokenizer.decode(ids)) != ids, name
        ids.append(turn_end(tokenizer))
        first = sample(tokenizer, [user("x")], ids)
        messages = [user("x"), first.reply, user("y")]
        prompt = build_prompt(tokenizer, canonical_messages(messages), None, [first])
        assert prompt.ids[: len(first.prompt_ids) + len(ids)] == [*first.prompt_ids, *ids], name


# ---- messages that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, error",
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": "x"}], "role is 'robot'; known are system, user"),
        ([{"content": "x"}], "role is None"),
        ([user("a"), user(7)], r"messages\[1\].content must be a string or a list"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], r"content\[0\] is of type 'image_url'.*text only"),
        ([user([{"type": "text", "text": "a"}, {"type": "input_audio"}])], r"content\[1\] is of type 'input_audio'"),
        ([user([{"type": "text"}])], r"content\[0\].text must be a string"),
        ([user("\ud800")], "half of a surrogate pair"),
        ([{**user("a"), "tool_calls": [call("f", "{}")]}], "in an assistant message"),
        ([{**assistant("a"), "tool_calls": [{"id": "x"}]}], r"tool_calls\[0\] must be"),
        ([{**assistant("a"), "tool_calls": [call(None, "{}")]}], "function.name must be a string"),
        ([{**assistant("a"), "function_call": {"name": "f"}}], "send tool_calls"),
    ],
)
def test_messages_that_cannot_be_read(messages, error):
    with pytest.raises(ValueError, match=error):
        canonical_messages(messages)


def test_canonical_form():
    messages = canonical_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [call("f", '{"x":1}'), call("g", "{broken")]},
            {"role": "tool", "tool_call_id": "abcdefgh1", "content": "3", "extra": 1},
        ]
    )
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", '{"x": 1}'), call("g", "{broken")]},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefgh1"},
    ]
    assert canonical_messages(messages) == messages


def test_a_template_that_refuses_the_messages(tokenizers):
    with pytest.raises(ValueError, match="chat template refuses.*alternate"):
        build_prompt(tokenizers["llama2"], canonical_messages([user("a"), user("b")]), None, [])


def test_no_chat_template(chatml_folder, tmp_path):
    load_tokenizer(chatml_folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InvalidConfigError, match="no chat template"):
        build_prompt(load_tokenizer(tmp_path), [user("a")], None, [])
