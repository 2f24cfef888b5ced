"""The mask, token by token: each conversation is also written down as pieces of text, learned or not.

The pieces meet where tokens meet, so their tokens in a row are those of the whole, found without the code under test.
"""

import json
import logging
from pathlib import Path

import pytest

from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.data.chat import end_ids
from nemo_rl_lora.data.loss_masks import encode_conversation, learns_end, token_rules

GSM8K = Path(__file__).resolve().parents[2] / "examples" / "data" / "gsm8k"
SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHAT = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5.\n\nAnything else?"},
    {"role": "user", "content": 'Täglich grüßt <the> 鯨: 12 "times"?'},
    {"role": "assistant", "content": "12 * 7 = 84, naturally 🙂"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]

# Writes earlier thoughts of the assistant away, as templates of reasoning models do.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "<think>two and three</think>5"},
    {"role": "user", "content": "4 + 4?"},
    {"role": "assistant", "content": "<think>four and four</think>8"},
]


def encoded(tokenizer, messages, *, only_final=False, max_length=10_000, **data):
    rules = token_rules(DataConfig.model_validate(data), tokenizer, only_final=only_final, max_length=max_length)
    return encode_conversation(tokenizer, messages, rules, "row 7 of rows.jsonl")


def expected(tokenizer, pieces):
    """(token ids, mask) of pieces of text, each with whether it is learned."""
    ids, mask = [], []
    for text, learned in pieces:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += own
        mask += [learned] * len(own)
    return tuple(ids), tuple(mask)


def learned_texts(tokenizer, tokens):
    """The runs of learned tokens, as text."""
    runs, last = [], False
    for token, learned in zip(tokens.token_ids, tokens.loss_mask, strict=True):
        if learned and not last:
            runs.append([])
        if learned:
            runs[-1].append(token)
        last = learned
    return [tokenizer.decode(run) for run in runs]


def chatml(messages, *, header_learned=False, only_last=False):
    """The pieces of messages in ChatML."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for number, message in enumerate(messages):
        learned = message["role"] == "assistant" and (number == last or not only_last)
        yield f"<|im_start|>{message['role']}\n", learned and header_learned
        yield f"{message['content']}<|im_end|>\n", learned


@pytest.mark.parametrize("only_final", [False, True])
@pytest.mark.parametrize("messages", [CHAT, WITH_SYSTEM, CHAT[:2]], ids=["chat", "system", "one turn"])
@pytest.mark.parametrize("header", [None, True, False])
def test_real_template_of_smollm2(smol, messages, header, only_final):
    tokenizer = smol()
    tokens = encoded(tokenizer, messages, only_final=only_final, add_generation_prompt=header)
    begin = [] if messages[0]["role"] == "system" else [(SMOL_SYSTEM, False)]
    pieces = [*begin, *chatml(messages, header_learned=header is False, only_last=only_final)]
    assert "".join(text for text, _ in pieces) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert (tokens.token_ids, tokens.loss_mask) == expected(tokenizer, pieces)
    assert tokens.num_cut_tokens == 0


def test_learned_tokens_decode_to_what_the_assistant_says(smol):
    tokenizer = smol()
    assert learned_texts(tokenizer, encoded(tokenizer, CHAT)) == [
        "It is 5.\n\nAnything else?<|im_end|>\n",
        "12 * 7 = 84, naturally 🙂<|im_end|>\n",
    ]
    assert learned_texts(tokenizer, encoded(tokenizer, CHAT, add_generation_prompt=False, only_final=True)) == [
        "<|im_start|>assistant\n12 * 7 = 84, naturally 🙂<|im_end|>\n"
    ]


@pytest.mark.parametrize("header", [True, False])
def test_template_of_sft_yaml(smol, sft_template, header):
    tokenizer = smol(sft_template)
    tokens = encoded(tokenizer, WITH_SYSTEM, add_generation_prompt=header)
    texts = [message["content"] for message in WITH_SYSTEM]
    pieces = [(f"Context: {texts[0]}", False)]
    for question, answer in ((texts[1], texts[2]), (texts[3], texts[4])):
        pieces += [(f" Question: {question}", False), (" Answer:", not header), (f" {answer}", True)]
    assert (tokens.token_ids, tokens.loss_mask) == expected(tokenizer, pieces)


def test_template_null_joins_the_messages_and_learns_the_answers(smol):
    tokenizer = smol(None)
    messages = [{"role": "user", "content": "Q:"}, {"role": "assistant", "content": " forty two"}]
    tokens = encoded(tokenizer, [*messages, {"role": "user", "content": " more"}, messages[1]])
    pieces = [("Q:", False), (" forty two", True), (" more", False), (" forty two", True)]
    assert (tokens.token_ids, tokens.loss_mask) == expected(tokenizer, pieces)


def test_token_across_the_border_belongs_where_it_ends(smol):
    tokenizer = smol(None)
    tokens = encoded(tokenizer, [{"role": "user", "content": "questio"}, {"role": "assistant", "content": "n is"}])
    assert [tokenizer.decode([token]) for token in tokens.token_ids] == ["question", " is"]
    assert tokens.loss_mask == (True, True)
    answered = [{"role": "user", "content": "One"}, {"role": "assistant", "content": " questio"}]
    tokens = encoded(tokenizer, [*answered, {"role": "user", "content": "n is"}, answered[1]])
    assert [tokenizer.decode([token]) for token in tokens.token_ids[:3]] == ["One", " question", " is"]
    assert tokens.loss_mask[:3] == (False, False, False)


def test_blanks_that_a_tokenizer_leaves_out_of_its_spans_stay_on_their_side():
    tokenizer = byte_tokenizer(trim_offsets=True)
    header = "{% if add_generation_prompt %}a: {% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}" + header
    messages = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": " z "}] * 2
    pieces = [("u: x y\n", False), ("a: ", False), (" z \n", True)] * 2
    text = "".join(piece for piece, _ in pieces)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert (3, 3) in offsets or (2, 2) in offsets, "the tokenizer of this test leaves no blank out"
    tokens = encoded(tokenizer, messages)
    assert (tokens.token_ids, tokens.loss_mask) == expected(tokenizer, pieces)


def byte_tokenizer(*, trim_offsets=False, **special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("header", [True, False])
def test_tiny_chatml_with_bytes(header):
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", unk_token="<|im_start|>")
    tokenizer.chat_template = FORGETS.replace(".split('</think>')[-1]", "")
    tokens = encoded(tokenizer, WITH_SYSTEM, add_generation_prompt=header)
    pieces = list(chatml(WITH_SYSTEM, header_learned=not header))
    assert (tokens.token_ids, tokens.loss_mask) == expected(tokenizer, pieces)


def test_real_rows_split_as_prompt_and_answer(smol):
    """By token prefix, as the speed comparison's rows are made: a second way to the same tokens."""
    tokenizer = smol()
    for line in (GSM8K / "train.jsonl").read_text().splitlines()[:50]:
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        chat = [*asked, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        tokens = encoded(tokenizer, chat)
        assert tokens.token_ids == tuple(whole)
        assert tokens.loss_mask == (False,) * len(prompt) + (True,) * (len(whole) - len(prompt))


def test_template_that_forgets_is_refused_and_its_last_turn_can_be_learned(smol):
    tokenizer = smol(FORGETS)
    with pytest.raises(ValueError) as error:
        encoded(tokenizer, THOUGHTS)
    assert str(error.value) == (
        "policy.tokenizer.chat_template: where turn 1 of the assistant's 2 stands in row 7 of rows.jsonl cannot be "
        "proven, since the template does not write the conversation up to there as it begins the whole. Give a "
        "template that marks the assistant's text with {% generation %} blocks, or learn the last turn only: "
        "sft.only_unmask_final=true."
    )
    tokens = encoded(tokenizer, THOUGHTS, only_final=True)
    assert learned_texts(tokenizer, tokens) == ["<think>four and four</think>8<|im_end|>\n"]
    assert "two and three" not in tokenizer.decode(tokens.token_ids)
    assert len(learned_texts(tokenizer, encoded(tokenizer, CHAT))) == 2


def test_last_turn_is_not_offered_where_it_cannot_be_proven_either(smol):
    opens = FORGETS.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(ValueError, match=r"turn 1 of the assistant's 1 .*blocks\.$"):
        encoded(smol(opens), CHAT[:2])
    assert len(learned_texts(smol(opens), encoded(smol(opens), THOUGHTS[:2]))) == 1


def test_template_that_marks_its_text_is_believed(smol):
    tokenizer = smol(MARKS)
    tokens = encoded(tokenizer, THOUGHTS)
    assert learned_texts(tokenizer, tokens) == ["5<|im_end|>", "<think>four and four</think>8<|im_end|>"]
    last = encoded(tokenizer, THOUGHTS, only_final=True)
    assert learned_texts(tokenizer, last) == ["<think>four and four</think>8<|im_end|>"]
    assert last.token_ids == tokens.token_ids
    with pytest.raises(ValueError, match=r"^data.add_generation_prompt=False: the chat template says itself what"):
        encoded(tokenizer, THOUGHTS, add_generation_prompt=False)


def test_long_conversation_is_cut_at_its_end_and_counted(smol):
    tokenizer = smol()
    whole = encoded(tokenizer, CHAT)
    cut = encoded(tokenizer, CHAT, max_length=len(whole.token_ids) - 5)
    assert (cut.token_ids, cut.loss_mask, cut.num_cut_tokens) == (whole.token_ids[:-5], whole.loss_mask[:-5], 5)
    nothing = encoded(tokenizer, CHAT, max_length=3)
    assert (sum(nothing.loss_mask), len(nothing.token_ids), nothing.num_cut_tokens) == (0, 3, len(whole.token_ids) - 3)


TWO_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content[:3] }}{% endgeneration %}|{% generation %}{{ m.content[3:] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_the_whole_last_turn_is_learned_of_a_template_that_marks_it_in_pieces(smol, num_turns):
    tokenizer = smol(TWO_MARKS)
    turn = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "One two"}]
    tokens = encoded(tokenizer, turn * num_turns, only_final=True)
    assert learned_texts(tokenizer, tokens) == ["One", " two<|im_end|>"]
    every = encoded(tokenizer, turn * num_turns)
    assert learned_texts(tokenizer, every) == ["One", " two<|im_end|>"] * num_turns
    assert tokens.token_ids == every.token_ids


@pytest.mark.parametrize("tag", ["{%- generation %}", "{%- generation -%}", "{%+ generation %}", "{%generation%}"])
def test_a_block_is_one_however_its_tag_treats_blanks(smol, tag):
    tokens = encoded(smol(MARKS.replace("{% generation %}", tag)), CHAT, only_final=True)
    assert learned_texts(smol(), tokens) == ["12 * 7 = 84, naturally 🙂<|im_end|>"]


def test_a_block_in_a_comment_is_none(smol, sft_template):
    plain, commented = (smol(text) for text in (sft_template, "{# {% generation %} #}" + sft_template))
    assert encoded(commented, WITH_SYSTEM) == encoded(plain, WITH_SYSTEM)


MARKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set ns = namespace(later=false) %}"
    "{% for n in messages[loop.index:] if n.role == 'assistant' %}{% set ns.later = true %}{% endfor %}"
    "{% if m.role == 'assistant' and not ns.later %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
def test_a_template_that_marks_the_last_answer_alone_learns_it_whole(smol, ending):
    tokens = encoded(smol(MARKS_LAST + ending), CHAT, only_final=True)
    assert learned_texts(smol(), tokens) == ["12 * 7 = 84, naturally 🙂<|im_end|>"]
    assert tokens == encoded(smol(MARKS_LAST + ending), CHAT)


def test_marks_of_turns_that_are_written_in_another_way_before_the_last_one_are_refused(smol):
    with pytest.raises(ValueError, match="which of the marked text of row 7 of rows.jsonl is the last turn's"):
        encoded(smol("{{ messages | length }}" + MARKS), CHAT, only_final=True)


ENDS_OUTSIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}END\n{% endfor %}"
)
NEVER_ENDS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends", "last"),
    [
        (MARKS, True, "8<|im_end|>"),
        (ENDS_OUTSIDE.replace("END", "<|im_end|>"), False, "four and four</think>8<|im_end|>"),
        (ENDS_OUTSIDE.replace("END", "\n<|endoftext|>"), False, "four and four</think>8<|endoftext|>\n<|im_end|>"),
        (ENDS_OUTSIDE.replace("END", ""), False, "four and four</think>8<|im_end|>"),
        (NEVER_ENDS, False, "8<|im_end|>"),
    ],
)
def test_what_is_learned_ends_the_turn_with_add_eos(smol, template, ends, last):
    tokenizer = smol(template)
    special = end_ids(tokenizer)
    assert learns_end(tokenizer, encoded(tokenizer, THOUGHTS, only_final=True), special) is ends
    tokens = encoded(tokenizer, THOUGHTS, only_final=True, add_eos=True)
    assert learns_end(tokenizer, tokens, special)
    assert learned_texts(tokenizer, tokens)[-1].endswith(last)


def test_a_row_of_which_nothing_is_marked_is_refused_and_no_length_is_blamed(smol):
    with pytest.raises(ValueError) as error:
        encoded(smol(MARKS.replace("'assistant'", "'model'")), CHAT, max_length=20)
    assert str(error.value) == (
        "policy.tokenizer.chat_template: nothing is learned of row 7 of rows.jsonl, since the template has "
        "{% generation %} blocks, of which none is reached there, or they are empty. Put them around what the "
        "assistant says."
    )


def test_bos_and_eos_are_added_where_they_are_not(smol, sft_template):
    tokenizer = smol(sft_template)
    plain = encoded(tokenizer, WITH_SYSTEM, add_bos=False, add_eos=False)
    tokens = encoded(tokenizer, WITH_SYSTEM, add_bos=True, add_eos=True)
    assert tokens.token_ids == (tokenizer.bos_token_id, *plain.token_ids, tokenizer.eos_token_id)
    assert tokens.loss_mask == (False, *plain.loss_mask, True)
    assert plain == encoded(tokenizer, WITH_SYSTEM)
    cut = encoded(tokenizer, WITH_SYSTEM, add_bos=True, add_eos=True, max_length=10)
    assert (len(cut.token_ids), cut.num_cut_tokens) == (10, len(tokens.token_ids) - 10)


def test_bos_and_eos_that_the_template_writes_are_not_added_again(smol):
    tokenizer = smol()  # begins with <|im_start|>, its bos, and ends with <|im_end|>, its eos, and a newline
    assert encoded(tokenizer, CHAT, add_bos=True, add_eos=True) == encoded(tokenizer, CHAT)
    other_end = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>\n{% endif %}{% endfor %}"
    )
    tokenizer = smol(other_end)
    tokens = encoded(tokenizer, CHAT, add_eos=True)
    assert tokenizer.convert_ids_to_tokens(tokens.token_ids[-3:]) == ["<|endoftext|>", "Ċ", "<|im_end|>"]
    assert tokens.loss_mask[-3:] == (True, True, True)


def test_tokenizer_without_bos_is_warned_of_once_and_gets_none(caplog):
    tokenizer = byte_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with caplog.at_level(logging.WARNING):
        rules = token_rules(DataConfig(add_bos=True), tokenizer, only_final=False, max_length=99)
        for _ in range(3):
            tokens = encode_conversation(tokenizer, CHAT[:2], rules, "row 0")
    assert [record.message for record in caplog.records] == [
        "data.add_bos=True: the tokenizer has no bos token, so none is added"
    ]
    assert tokenizer.decode(tokens.token_ids) == CHAT[0]["content"] + CHAT[1]["content"]
