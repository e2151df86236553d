"""Writers of evolution prompts: a tiny model, a real server with injected faults, a cache, kills, no key anywhere."""

import http.server
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import FOREVER, QUICKLY, store  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data_tools import cli, evolve
from data_tools.evolve import writers
from data_tools.evolve.verb import _Places, settled
from data_tools.evolve.writers import ServerSettings, ServerWriter
from data_tools.ingest import Triplet, read_triplets, sole_writer, write_triplets
from v4e import config as settings_of
from v4e.data.places import place, put
from v4e.errors import CheckpointError, ConfigError, DataError, V4EError
from v4e.models import vlm
from v4e.models.vlm import LocalVlm, Question, Reply, ServerVlm
from v4e.nouns import Clip

KEY = "sk-very-secret-0123456789"
ANSWER = "Start: {0} is not there.\nProcess: {0} comes.\nEnd: {0} is there.\nUnchanged: all else stays."
PROMPT = "Static camera. At first: {0} is not there. Then: {0} comes. At last: {0} is there. All else stays."


def picture(seed, size=(24, 32)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def clip(seed):
    return Clip(torch.from_numpy(picture(seed)).permute(2, 0, 1)[None].contiguous())


def make_folder(path, instructions, **more):
    """An ingested folder: one triplet an instruction, its pictures as files."""
    path.mkdir()
    triplets = []
    for n, instruction in enumerate(instructions):
        files = [path / f"{n}.{kind}.png" for kind in ("source", "edited")]
        for side, file in enumerate(files):
            Image.fromarray(picture(2 * n + side)).save(file)
        triplets.append(Triplet(f"t{n}", instruction, *files, stamp=f"s{n}", **more))
    write_triplets(path, triplets)
    return path


# ------------------------------------------------------------------------------------------------- the verb


def test_the_template_fills_what_is_missing(tmp_path):
    folder = make_folder(tmp_path / "f", ["remove the red ball", "make it snow", "把狗换成一只猫"])
    x, y, z = read_triplets(folder)
    write_triplets(folder, [x, replace(y, evolution="snow falls", task="weather"), z])
    report = evolve.add_evolutions(folder)
    assert report.written == {"remove": 1, "replace": 1} and report.kept == {"data": 1}
    assert report.families == {"spatial": 2}
    x, y, z = read_triplets(folder)
    assert "fades out" in x.evolution and (x.writer, x.task) == ("template 2", "remove")
    assert (y.evolution, y.writer, y.task) == ("snow falls", "", "weather")
    assert z.evolution.startswith("固定镜头。")
    before = (folder / "triplets.jsonl").read_bytes()
    report = evolve.add_evolutions(folder, again=True)
    assert report.written == {} and report.kept == {"template 2": 2, "data": 1}
    assert (folder / "triplets.jsonl").read_bytes() == before
    assert json.loads((folder / "evolve.json").read_text())["kept"] == {"template 2": 2, "data": 1}


def test_other_writers_prompts_stay_unless_told(tmp_path):
    folder = make_folder(tmp_path / "f", ["make it snow"], evolution="as of old", writer="template 1")
    assert evolve.add_evolutions(folder).kept == {"template 1": 1}
    assert read_triplets(folder)[0].evolution == "as of old"
    assert evolve.add_evolutions(folder, again=True).written == {"tone": 1}
    assert "snowy winter" in read_triplets(folder)[0].evolution


def test_of_an_id_the_last_whole_row_counts(tmp_path):
    lines = [b'{"id":"%s"}\n' % key for key in (b"b", b"a", b"b", b"c")]
    (tmp_path / "log").write_bytes(b"".join(lines) + b'{"id":"a"')
    places = _Places(tmp_path / "log")
    size = len(lines[0])
    assert [places.of(key) for key in ("a", "b", "c", "d")] == [size, 2 * size, 3 * size, -1]
    (tmp_path / "log").write_bytes(b"")
    assert _Places(tmp_path / "log").of("a") == -1


def test_a_damaged_list_is_refused_before_anything_is_asked(tmp_path):
    folder, writer = make_folder(tmp_path / "f", ["add a cat", "add a dog"]), Scripted(batch=1)
    path = folder / "triplets.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, told in (
        (lines[0] + lines[1].replace(b"dog", b"cow"), "line 2: key t1: not the line that was written"),
        (lines[0] + lines[1] + lines[0], "line 3: an earlier line has the id 't0' too"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=told):
            evolve.add_evolutions(folder, writer)
        assert writer.asked == [] and path.read_bytes() == damaged


def test_a_damaged_log_names_the_place(tmp_path):
    folder = make_folder(tmp_path / "f", ["make it snow"])
    (folder / ".evolved.jsonl").write_bytes(b"{]\n")
    with pytest.raises(DataError, match=r"\.evolved\.jsonl, byte 0"):
        evolve.add_evolutions(folder)


@pytest.mark.parametrize(
    ("evolution", "writer", "again", "kept"),
    [
        ("", "", False, False),
        ("x", "", True, True),
        ("x", "server 1 m abc", True, True),
        ("x", "server 1 m OTHER", False, True),
        ("x", "server 1 m OTHER", True, False),
        ("x", "template 2 for server 1 m abc (refusal)", True, True),
        ("x", "template 2 for server 1 m abc (time-out, another try may help)", False, False),
        ("x", "template 2 for server 1 m OTHER (time-out, another try may help)", False, True),
    ],
)
def test_who_is_asked_again(tmp_path, evolution, writer, again, kept):
    row = Triplet("x", "make it snow", tmp_path, tmp_path, evolution=evolution, writer=writer)
    assert settled(row, "server 1 m abc", again) == kept


def test_an_instruction_without_words_is_named_and_the_others_written(tmp_path):
    folder = make_folder(tmp_path / "f", ["!!!", "make it snow"])
    with pytest.raises(DataError, match="1 instructions say nothing: t0"):
        evolve.add_evolutions(folder)
    bad, good = read_triplets(folder)
    assert bad.evolution == "" and good.evolution
    (line,) = (folder / "evolve_fallbacks.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "t0" and json.loads(line)["failure"] == "empty instruction"


def test_nothing_ingested_and_two_at_work(tmp_path):
    with pytest.raises(DataError, match="ingest"):
        evolve.add_evolutions(tmp_path / "none")
    folder = make_folder(tmp_path / "f", ["make it snow"])
    with sole_writer(folder), pytest.raises(DataError, match="another writer is at work"):
        evolve.add_evolutions(folder)


class Scripted:
    """A writer that writes what it is told, in batches; anything but a draft is raised."""

    signature = "scripted 1"

    def __init__(self, batch=2, stop_after=10**9):
        self.batch, self.left, self.asked = batch, stop_after, []

    def drafts(self, triplets):
        for window in writers._windows(triplets, self.batch):
            if self.left <= 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked += [t.id for t in window]
            yield [writers.Draft(t, f"film of {t.instruction}") for t in window]


class Failing(Scripted):
    signature = "failing 1"

    def drafts(self, triplets):
        for window in writers._windows(triplets, self.batch):
            yield [writers.Draft(t, failure="garbage", detail="?") for t in window]


def test_a_failing_writer_does_not_cost_the_prompts_of_a_better_one(tmp_path):
    folder = make_folder(tmp_path / "f", ["make it snow", "add a cat"])
    x, y = read_triplets(folder)
    write_triplets(folder, [replace(x, evolution="as a model saw it", writer="server 1 m abc"), y])
    assert evolve.add_evolutions(folder, Failing(), again=True).fallbacks == {"garbage": 2}
    x, y = read_triplets(folder)
    assert (x.evolution, x.writer) == ("as a model saw it", "server 1 m abc")
    assert y.writer == "template 2 for failing 1 (garbage)"


def test_a_stopped_run_goes_on_in_the_same_batches_after_half_a_line(tmp_path):
    folder = make_folder(tmp_path / "f", [f"add a cat {n}" for n in range(7)])
    first, second = Scripted(stop_after=2), Scripted()
    with pytest.raises(KeyboardInterrupt):
        evolve.add_evolutions(folder, first)
    with open(folder / ".evolved.jsonl", "ab") as log:
        log.write(b'{"id": "t4", "stamp": "s4", "evol')
    report = evolve.add_evolutions(folder, second)
    assert (first.asked, second.asked) == (["t0", "t1", "t2", "t3"], ["t4", "t5", "t6"])
    assert report.written == {"add": 3} and report.kept == {"scripted 1": 4}
    assert [t.evolution for t in read_triplets(folder)] == [f"film of add a cat {n}" for n in range(7)]
    assert not (folder / ".evolved.jsonl").exists()


class Uneven(Scripted):
    """Fails where it is told, and is killed after so many."""

    def drafts(self, triplets):
        for batch in super().drafts(triplets):
            yield [replace(d, prompt="", failure="garbage") if d.triplet.id in self.fails else d for d in batch]


@pytest.mark.parametrize(("fails", "share"), [(["t0", "t1", "t2"], "37.5%"), (["t6", "t7"], "25.0%")])
def test_the_share_of_fallbacks_is_that_of_what_a_killed_run_wrote_too(tmp_path, fails, share):
    folder = make_folder(tmp_path / "f", [f"add a cat {n}" for n in range(8)])
    for stop_after in (6, 8):
        writer = Uneven(batch=1, stop_after=stop_after)
        writer.fails = fails
        with pytest.raises(KeyboardInterrupt if stop_after == 6 else DataError) as why:
            evolve.add_evolutions(folder, writer, max_fallback_fraction=0.2)
    assert f"{share} of the prompts, a killed run's among them, fell back" in str(why.value)
    assert len((folder / "evolve_fallbacks.jsonl").read_text().splitlines()) == len(fails)
    assert evolve.add_evolutions(folder, writer, max_fallback_fraction=0.2).kept.total() == 8


def test_what_changed_since_the_kill_is_asked_again(tmp_path):
    folder = make_folder(tmp_path / "f", ["add a cat", "add a dog"])
    with pytest.raises(KeyboardInterrupt):
        evolve.add_evolutions(folder, Scripted(batch=1, stop_after=1))
    x, y = read_triplets(folder)
    write_triplets(folder, [replace(x, instruction="add a cow", stamp="new"), y])
    writer = Scripted(batch=1)
    evolve.add_evolutions(folder, writer)
    assert writer.asked == ["t0", "t1"] and read_triplets(folder)[0].evolution == "film of add a cow"


# ------------------------------------------------------------------------------------------------- a model here

CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    """A LLaVA of 2 x 2 layers with random weights, wild enough for every picture to matter."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "the", "before", "after", "picture", ":", "make", "it", "snow"]
    tokens = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name}_token": word for name, word in zip(("pad", "bos", "eos", "unk"), words, strict=False)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, initializer_range=0.5, **size),
        text_config=LlamaConfig(vocab_size=16, num_key_value_heads=2, initializer_range=0.5, eos_token_id=2, **size),
        image_token_id=4,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    made = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
        image_token="<image>",
    )
    path = tmp_path_factory.mktemp("vlm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


def test_a_model_here_sees_both_pictures_and_batches_change_nothing(vlm_folder):
    model = LocalVlm.load(str(vlm_folder), dtype="fp32", tokens=12)
    first = Question(("the picture before:", clip(0), "after:", clip(1), "make it snow"))
    longer = Question(("the picture before:", clip(2), "after:", clip(3), "make it snow " * 6))
    both = model.ask([first, longer])
    assert both == model.ask([first]) + model.ask([longer])
    assert all(0 < reply.wrote <= 12 and reply.failure in ("", "cut off", "empty") for reply in both)
    assert both[1].read - both[0].read == 5 * 3  # words; each picture has 4 patches in both
    others = [Question((*first.parts[:1], clip(s), "after:", clip(t), "make it snow")) for s, t in ((7, 1), (0, 7))]
    words = [model._ask([question])[0] for question in (first, *others)]
    assert len({(reply.text, reply.wrote) for reply in words}) == 3


def test_a_model_that_says_nothing_of_use_falls_back_and_is_not_asked_again(vlm_folder, tmp_path, capsys):
    folder = make_folder(tmp_path / "f", ["make it snow", "remove the cat", "把狗换成一只猫"])
    words = ["--writer", "local", f"model={vlm_folder}", "batch=2", "dtype=fp32", "tokens=6"]
    assert cli.main(["evolve", str(folder), *words]) == 0
    assert "3 fell back to the template" in capsys.readouterr().out
    rows = read_triplets(folder)
    assert [t.evolution for t in rows] == [evolve.write(t.instruction).prompt for t in rows]
    assert all(re.fullmatch(r"template 2 for local 1 \S+ \w{8} \([\w -]+\)", t.writer) for t in rows)
    assert cli.main(["evolve", str(folder), *words]) == 0
    assert "0 written" in capsys.readouterr().out
    assert cli.main(["evolve", str(folder), *words, "--again", "--max-fallback-fraction", "0.5"]) == 0
    assert cli.main(["evolve", str(folder), *words, "tokens=5", "--again", "--max-fallback-fraction", "0.5"]) == 4
    assert "100.0% of the prompts fell back" in capsys.readouterr().err


def test_a_picture_that_the_processor_refuses_fails_alone():
    model = LocalVlm("m", None, None, 64, 8)
    model._ask = lambda qs: [Reply("ok") for _ in qs] if not any("bad" in q.words for q in qs) else _refuse()
    assert [r.failure or r.text for r in model.ask([Question(("good",)), Question(("bad",)), Question(("good",))])] == [
        "ok",
        "picture refused",
        "ok",
    ]
    with pytest.raises(CheckpointError, match="takes no such questions: absolute aspect ratio"):
        model.ask([Question(("bad",)), Question(("bad",))])


def _refuse():
    raise ValueError("absolute aspect ratio must be smaller than 200")


def test_folders_that_are_no_such_model(vlm_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no model folder"):
        LocalVlm.load(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="not a vision-language model"):
        LocalVlm.load(str(tmp_path))


# ------------------------------------------------------------------------------------------------- a model elsewhere


class Endpoint(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that misbehaves as the instruction says, as often as ``times`` says."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.keys, self.bodies, self.lock = Counter(), set(), [], threading.Lock()
        self.times, self.delay = 10**9, 0.0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802  (the standard library's name)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][-1]["text"]
        asked = re.search(r"asked for this change: (.*)", text)[1]
        with self.server.lock:
            self.server.seen[asked] += 1
            self.server.keys.add(self.headers["Authorization"])
            self.server.bodies.append(body)
            fault = asked.split(":")[0] if self.server.seen[asked] <= self.server.times else ""
        time.sleep(self.server.delay)
        getattr(self, f"fault_{fault.replace('-', '_')}", self.fine)(asked)

    def fine(self, asked):
        self.say(self.answer(ANSWER.format(asked.split(": ")[-1])))

    def fault_429(self, _):
        self.say({"error": "slow down"}, 429, {"Retry-After": "0.05"})

    def fault_500(self, _):
        self.say({"error": f"trouble with Bearer {KEY}"}, 500)

    def fault_hang(self, _):
        time.sleep(1.0)

    def fault_hang_up(self, _):
        self.connection.close()

    def fault_html(self, _):
        self.send(b"<html>Bad gateway</html>", 200, {"Content-Type": "text/html"})

    def fault_garbage(self, _):
        self.send(bytes(range(256)), 200, {"Content-Encoding": "gzip"})

    def fault_half(self, _):
        self.say(self.answer(ANSWER.format("\ud83d cat")))

    def fault_half_refused(self, _):
        self.say(self.answer(None, refusal="No \ud83d."))

    def fault_odd_json(self, _):
        self.say({"choices": []})

    def fault_policy(self, _):
        self.say({"error": {"code": "content_policy_violation"}}, 400)

    def fault_wrong(self, _):
        self.say({"error": f"unknown parameter, key {KEY}"}, 400)

    def fault_filter(self, _):
        self.say(self.answer("", finish_reason="content_filter"))

    def fault_refusal(self, _):
        self.say(self.answer("I'm sorry, I can't help with that."))

    def fault_declined(self, _):
        self.say(self.answer(None, refusal="No."))

    def fault_long(self, _):
        self.say(self.answer("Start: on and on", finish_reason="length"))

    def fault_empty(self, _):
        self.say(self.answer(""))

    def fault_echo(self, asked):
        self.say(self.answer(ANSWER.format(KEY)))

    def fault_locked(self, _):
        self.say({"error": f"invalid key {KEY}"}, 401)

    def answer(self, content, finish_reason="stop", **more):
        choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
        return {"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 50}}

    def say(self, value, status=200, headers=()):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **dict(headers)})

    def send(self, content, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def settings_for(endpoint, **more):
    quick = {"timeout_s": 0.3, "retries": 2, "backoff_s": 0.01, "concurrency": 4, "key_variable": "V4E_TEST_KEY"}
    return ServerSettings(**{"url": endpoint.url, "model": "test-model", **quick, **more})


def ask(endpoint, folder, monkeypatch, again=False, **more):
    monkeypatch.setenv("V4E_TEST_KEY", KEY)
    return evolve.add_evolutions(folder, ServerWriter.load(settings_for(endpoint, **more), folder), again=again)


def test_a_server_is_asked_with_both_pictures_and_its_answers_are_kept(endpoint, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "f", ["a red hat", "a blue hat", "a green hat"])
    report = ask(endpoint, folder, monkeypatch)
    assert [t.evolution for t in read_triplets(folder)] == [
        PROMPT.format(t.instruction).replace("All else", "All else") for t in read_triplets(folder)
    ]
    assert report.fallbacks == {} and (report.read, report.wrote, report.cached) == (3000, 150, 0)
    assert endpoint.keys == {f"Bearer {KEY}"} and set(endpoint.seen.values()) == {1}
    assert {re.sub(r"\w{8}$", "HASH", t.writer) for t in read_triplets(folder)} == {"server 1 test-model HASH"}
    for body in endpoint.bodies:
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        assert kinds == ["text", "image_url", "text", "image_url", "text"]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("test-model", 0, 400)
        assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert ask(endpoint, folder, monkeypatch).kept.total() == 3 and endpoint.seen.total() == 3


PASSING = {
    "429": "rate limit",
    "500": "server error",
    "hang": "time-out",
    "hang-up": "no connection",
    "html": "garbage",
    "garbage": "garbage",
    "odd-json": "garbage",
}
LASTING = {
    "policy": "refusal",
    "wrong": "bad request",
    "filter": "refusal",
    "refusal": "refusal",
    "declined": "refusal",
    "long": "cut off",
    "empty": "empty",
}


def test_passing_trouble_is_sat_out(endpoint, tmp_path, monkeypatch):
    endpoint.times = 2
    folder = make_folder(tmp_path / "f", [f"{fault}: a hat" for fault in PASSING])
    report = ask(endpoint, folder, monkeypatch)
    assert report.fallbacks == {} and {t.evolution for t in read_triplets(folder)} == {PROMPT.format("a hat")}
    assert set(endpoint.seen.values()) == {3}


def test_trouble_that_stays_is_counted_by_reason_and_only_passing_trouble_asked_again(endpoint, tmp_path, monkeypatch):
    faults = {**PASSING, **LASTING}
    folder = make_folder(tmp_path / "f", [f"{fault}: a hat" for fault in faults])
    report = ask(endpoint, folder, monkeypatch, retries=1)
    assert report.fallbacks == Counter(faults.values()) and report.written.total() == len(faults)
    assert {fault: endpoint.seen[f"{fault}: a hat"] for fault in faults} == {
        **dict.fromkeys(PASSING, 2),
        **dict.fromkeys(LASTING, 1),
    }
    for triplet in read_triplets(folder):
        fault = triplet.instruction.split(":")[0]
        why = faults[fault] + ", another try may help" * (fault in PASSING)
        assert triplet.writer.endswith(f"({why})") and triplet.evolution == evolve.write(triplet.instruction).prompt
    lines = [json.loads(line) for line in (folder / "evolve_fallbacks.jsonl").read_text().splitlines()]
    assert {line["id"]: line["failure"] for line in lines} == {f"t{n}": why for n, why in enumerate(faults.values())}
    endpoint.times = 0
    report = ask(endpoint, folder, monkeypatch)
    assert report.fallbacks == {} and report.written.total() == len(PASSING) and report.kept.total() == len(LASTING)


def test_the_key_is_nowhere(endpoint, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("DEBUG")
    faults = ["500: a", "wrong: a", "echo: a"]
    folder = make_folder(tmp_path / "f", faults)
    monkeypatch.setenv("V4E_TEST_KEY", f" {KEY}\n")  # as `cat` of a file leaves it
    words = [f"url={endpoint.url}", "model=m", "key_variable=V4E_TEST_KEY", "retries=1", "backoff_s=0.01"]
    assert cli.main(["evolve", str(folder), "--writer", "server", *words]) == 0
    said = capsys.readouterr()
    texts = [said.out, said.err, caplog.text, *(p.read_text("utf-8", "replace") for p in folder.rglob("*.json*"))]
    assert endpoint.keys == {f"Bearer {KEY}"} and "trouble with Bearer [key]" in "".join(texts)
    assert not any(KEY in text for text in texts)
    assert PROMPT.format("[key]") in {t.evolution for t in read_triplets(folder)}
    locked = make_folder(tmp_path / "g", ["locked: a"])
    assert cli.main(["evolve", str(locked), "--writer", "server", *words]) == ConfigError.exit_code
    err = capsys.readouterr().err
    assert "refuses every question: status 401" in err and "invalid key [key]" in err and KEY not in err
    assert KEY not in repr(ServerWriter.load(settings_for(endpoint), folder))


def test_half_a_character_is_replaced(endpoint, tmp_path, monkeypatch):
    """As when an emoji of two UTF-16 units is cut at the longest answer."""
    folder = make_folder(tmp_path / "f", ["half: a hat", "half-refused: a hat"])
    report = ask(endpoint, folder, monkeypatch)
    assert report.fallbacks == {"refusal": 1} and read_triplets(folder)[0].evolution == PROMPT.format("? cat")
    assert json.loads((folder / "evolve_fallbacks.jsonl").read_text())["detail"] == "No ?."
    again = make_folder(tmp_path / "g", ["half: a hat", "half-refused: a hat"])
    assert ask(endpoint, again, monkeypatch, cache=str(folder / "answers")).cached == 2


def test_settings_that_would_leak_or_cannot_work(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("V4E_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="V4E_TEST_KEY is not set"):
        ServerWriter.load(settings_for(endpoint), tmp_path)
    with pytest.raises(ConfigError, match="no model is named"):
        ServerWriter.load(settings_for(endpoint, model=""), tmp_path)
    for url in ("https://me:word@host/v1", "https://host/v1?key=abc"):
        with pytest.raises(ConfigError, match="secret does not belong"):
            ServerVlm(url, "m")
    with pytest.raises(ConfigError, match="no address"):
        ServerVlm("localhost:8000", "m")
    with pytest.raises(ConfigError, match="no header takes") as caught:
        ServerVlm("http://host", "m", key="sk secret")
    assert "sk secret" not in str(caught.value)
    assert ServerWriter.load(settings_for(endpoint, key_variable="none"), tmp_path).vlm.key == ""


def test_the_cache_knows_all_that_determines_an_answer(endpoint, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first, second = (make_folder(tmp_path / name, ["a hat", "refusal: a hat"]) for name in "ab")
    paid = ask(endpoint, first, monkeypatch, cache=cache)
    free = ask(endpoint, second, monkeypatch, cache=cache)
    assert (paid.read, paid.cached) == (2000, 0) and (free.read, free.cached) == (0, 2)
    assert endpoint.seen.total() == 2 and free.fallbacks == paid.fallbacks == {"refusal": 1}
    for n, more in enumerate(({"parameters": {"temperature": 1}}, {"model": "other"}, {"side": 16})):
        folder = make_folder(tmp_path / f"c{n}", ["a hat"])
        assert ask(endpoint, folder, monkeypatch, cache=cache, **more).cached == 0
    folder = make_folder(tmp_path / "d", ["a hat"])
    Image.fromarray(picture(99)).save(folder / "0.edited.png")
    assert ask(endpoint, folder, monkeypatch, cache=cache).cached == 0
    entries = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(entries) == 6
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:20])
    assert ask(endpoint, make_folder(tmp_path / "e", ["a hat"]), monkeypatch, cache=cache).cached == 0


def test_a_picture_that_is_gone_costs_its_own_prompt_alone(endpoint, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "f", ["a hat", "a cap"])
    (folder / "0.edited.png").unlink()
    report = ask(endpoint, folder, monkeypatch)
    assert report.fallbacks == {"unreadable picture": 1} and report.written.total() == 2
    assert "0.edited.png" in (folder / "evolve_fallbacks.jsonl").read_text()


def test_a_picture_that_a_store_withholds_is_asked_for_again(store, endpoint, tmp_path, monkeypatch):  # noqa: F811
    url, fail = store
    monkeypatch.setattr(writers, "patiently", QUICKLY)
    here, there = make_folder(tmp_path / "f", ["a hat", "a cap"]), place(url) / "f"
    for path in here.glob("*.png"):
        put(there / path.name, path.read_bytes())
    moved = ({k: there / p.name for k, p in t.files.items()} for t in read_triplets(here))
    write_triplets(there, [replace(t, **files) for t, files in zip(read_triplets(here), moved, strict=True)])
    fail("0.edited.png", 3)
    fail("1.source.png", FOREVER)
    assert ask(endpoint, there, monkeypatch).fallbacks == {"unreadable picture": 1}
    first, second = read_triplets(there)
    assert first.evolution == PROMPT.format("a hat")
    assert second.writer.endswith("(unreadable picture, another try may help)")
    fail("1.source.png", 0)
    assert ask(endpoint, there, monkeypatch).written.total() == 1
    assert read_triplets(there)[1].evolution == PROMPT.format("a cap")


def test_a_dead_server_ends_the_run_and_what_was_written_counts_later(endpoint, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "f", ["a hat", *[f"500: {n}" for n in range(12)], "a cap"])
    with pytest.raises(V4EError, match=r"questions in a row went unanswered, the last one: server error: status 500"):
        ask(endpoint, folder, monkeypatch, retries=0, give_up_after=5, concurrency=1)
    asked = endpoint.seen.total()
    assert 6 <= asked < 14
    endpoint.times = 0
    report = ask(endpoint, folder, monkeypatch)
    assert report.fallbacks == {} and endpoint.seen["a hat"] == 1
    assert {t.evolution for t in read_triplets(folder)} >= {PROMPT.format("a hat"), PROMPT.format("a cap")}
    assert all(t.writer.startswith("server 1") for t in read_triplets(folder))


def test_sigkill_loses_nothing_finished(endpoint, tmp_path, monkeypatch):
    """A forked child is killed twice in the midst of its questions; its answers are neither lost nor bought again."""
    instructions = [f"hat number {n}" for n in range(40)]
    folder = make_folder(tmp_path / "f", instructions)
    endpoint.delay = 0.03
    for goal in (10, 25):
        child = os.fork()
        if child == 0:
            try:
                ask(endpoint, folder, monkeypatch)
            finally:
                os._exit(0)
        while endpoint.seen.total() < goal:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    ask(endpoint, folder, monkeypatch)
    assert [t.evolution for t in read_triplets(folder)] == [PROMPT.format(i) for i in instructions]
    again = [i for i, n in endpoint.seen.items() if n > 1]
    assert len(again) <= 2 * 4  # at each kill, at most as many as were under way


def test_waits_double_are_bounded_and_heed_retry_after(monkeypatch):
    waited = []
    server = ServerVlm("http://localhost:1/v1", "m", backoff_s=1.0, longest_wait_s=10.0)
    monkeypatch.setattr(server._closed, "wait", waited.append)
    monkeypatch.setattr(vlm.random, "random", lambda: 1.0)
    for tries, after in ((1, 0.0), (2, 0.0), (3, 0.0), (9, 0.0), (1, 7.0), (1, 99.0)):
        server._wait(tries, after)
    assert waited == [1.0, 2.0, 4.0, 10.0, 7.0, 10.0]
    assert 9.0 < server._open_again - time.monotonic() <= 10.0
    monkeypatch.setattr(vlm.random, "random", lambda: 0.0)
    server._wait(2, 0.0)
    assert waited[-1] == 1.0


@pytest.mark.parametrize(
    ("said", "seconds"), [("3", 3.0), ("-1", 0.0), ("", 0.0), ("soon", 0.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0)]
)
def test_retry_after_in_all_its_forms(said, seconds):
    assert vlm._retry_after(vlm.httpx.Response(429, headers={"Retry-After": said})) == seconds
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < vlm._retry_after(vlm.httpx.Response(429, headers={"Retry-After": date})) <= 30


def test_the_cost_is_that_of_the_tokens(endpoint, tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "f", ["a hat", "a cap"])
    monkeypatch.setenv("V4E_TEST_KEY", KEY)
    config = tmp_path / "server.yaml"
    config.write_text(f"url: {endpoint.url}\nmodel: m\nkey_variable: V4E_TEST_KEY\nprice_read: 2.5\nprice_wrote: 10\n")
    assert cli.main(["evolve", str(folder), "--writer", "server", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "2000 tokens read, 100 written, 0 answers from the cache, cost 0.0060" in out
    assert json.loads((folder / "evolve.json").read_text())["cost"] == pytest.approx(0.006)


def test_words_for_the_template_are_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "f", ["make it snow"])
    assert cli.main(["evolve", str(folder), "model=x"]) == ConfigError.exit_code
    assert "the template writer has no settings" in capsys.readouterr().err
    assert cli.main(["evolve", str(folder), "--writer", "local", "modle=x"]) == ConfigError.exit_code
    assert "did you mean model?" in capsys.readouterr().err


def test_commands_of_the_docs_parse():
    text = (Path(__file__).parents[1] / "docs/evolve.md").read_text()
    found = [line.split()[1:] for line in re.findall(r"^v4e-shards .*", text, re.MULTILINE)]
    assert len(found) == 4
    for words in found:
        args = cli.parse(words)
        kind = {"local": writers.LocalSettings, "server": writers.ServerSettings}.get(args.writer)
        assert kind is None or settings_of.load(None, args.overrides, lambda _, k=kind: k, recipe="x")
