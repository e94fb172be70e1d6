"""`model.new_tokens`: one id each wherever they stand, in examples as in any text; what has no room is refused."""

import json
import shutil

import numpy as np
import pytest

from gemma4_tpu import assets, new_tokens
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError

NEW = ("<result>", "<note>")


def with_reserve(folder, template=""):
    """The tiny tokenizer with two tokens in reserve, the one an added token as Gemma's are, the other a plain entry."""
    shutil.copytree(assets.ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    for number in range(3):
        left, right = (pair := model["merges"].pop()) if isinstance(model["merges"][-1], list) else pair.split()
        place = model["vocab"].pop(left + right)
        model["vocab"][f"<unused{number}>"] = place
        if number == 0:
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            content["added_tokens"].append({"id": place, "content": "<unused0>", **plain})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with open(folder / "chat_template.jinja", "a") as file:
        file.write(template)
    return folder


def test_each_is_one_token_and_decodes_to_itself(tmp_path):
    folder = with_reserve(tmp_path / "tokenizer")
    before, after = load_tokenizer(str(folder)), load_tokenizer(str(folder), NEW)
    found = new_tokens.places(str(folder), NEW)
    assert set(found.renamed) <= {"<unused0>", "<unused1>", "<unused2>"} and len(found.taken) == 2
    text = "a<result>b <note>\n<note>"
    ids = after(text, add_special_tokens=False).input_ids
    assert [i for i in ids if i in found.taken] == [found.ids[t] for t in ("<result>", "<note>", "<note>")]
    assert after.decode(ids, skip_special_tokens=True) == text
    assert len(after) == len(before) and len(before(text, add_special_tokens=False).input_ids) > len(ids)
    assert not set(found.renamed) & set(after.get_vocab())


def test_examples_with_them_are_proven(tmp_path):
    tokenizer = load_tokenizer(str(with_reserve(tmp_path / "tokenizer")), NEW)
    chat, ids = ChatFormat(tokenizer), tokenizer.convert_tokens_to_ids(list(NEW))
    turns = [{"role": "user", "content": "Look: <note>"}, {"role": "assistant", "content": "<result>4<result>"}]
    ((example,),) = chat.examples([chat.render(Conversation(messages=turns))])
    assert np.sum(example.ids == ids[1]) == 1 and not example.flags[example.ids == ids[1]].any()
    assert np.sum(example.ids == ids[0]) == 2 and example.flags[example.ids == ids[0]].all()


def test_one_that_is_there_keeps_its_place_and_one_in_the_template_is_not_taken(tmp_path):
    folder = with_reserve(tmp_path / "tokenizer", "{# <unused0> #}")
    found = new_tokens.places(str(folder), ["<result>", "<bos>", "<note>"])
    assert found.ids["<bos>"] == 2 and set(found.renamed) == {"<unused1>", "<unused2>"}


def test_without_room_it_says_how_to_enlarge_the_model(tmp_path):
    with pytest.raises(UserError, match=r"<result>: 1 new, but .* holds 0 tokens in reserve.*resize_token_embeddings"):
        load_tokenizer("embedded:tiny", ["<result>"])


@pytest.mark.parametrize(
    ("token", "told"), [(" ", "blank"), ("<a> ", "white space"), ("<|call|>", "write <call>"), ("<x>", "given twice")]
)
def test_what_can_be_no_token(token, told):
    (problem,) = new_tokens.problems([token, "<x>"])
    assert told in problem
