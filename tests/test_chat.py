"""chat.py: what the model is shown, what the user sees, and what happens at the edges of the window."""

from __future__ import annotations

from settings import UserError

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes_at_hand import ended

import chat
import tokenizer as tokenizer_module
from chat import Config, Conversation, command, set_sampling
from checkpoint import save_model
from model import Llama, LlamaConfig

ROOT = Path(chat.__file__).parent
TEXT = ["小羊驼在山坡上吃草。", "法国的首都是巴黎。", "一加一等于二，二加二等于四。", "春眠不觉晓，处处闻啼鸟。"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(f"{i}{line}" for i in range(50) for line in TEXT), encoding="utf-8")
    return tokenizer_module.train([folder / "text.txt"], 320, folder / "out")


def tiny(tokenizer, window=128) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(len(tokenizer), 32, 64, 2, 2, 1, max_position_embeddings=window, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)  # fmt: skip
    return Llama(config).eval()


@pytest.fixture(scope="module")
def sft_dir(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    save_model(tiny(tokenizer), path, tokenizer, template="baby")
    return path


@pytest.fixture(scope="module")
def base_dir(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_model(tiny(tokenizer), path, tokenizer)
    return path


SETTINGS = {name: getattr(Config(), name) for name in chat.SAMPLING} | {"temperature": 0.0, "max_new_tokens": 16}


def conversation(tokenizer, template="baby", system="", window=128, **settings) -> Conversation:
    return Conversation(tiny(tokenizer, window), tokenizer, template, SETTINGS | settings, system)


class Script:
    """Stands in for the model: every prompt is recorded, every answer is the given text."""

    def __init__(self, tokenizer, answer: str, window: int = 128):
        self.config, self.prompts, self.room = tiny(tokenizer, window).config, [], []
        self.answer = tokenizer.encode(answer)

    def generate(self, prompts, max_new_tokens, **sampling):
        self.prompts.append(prompts[0])
        self.room.append(max_new_tokens)
        self.sampling = sampling
        for token in self.answer[:max_new_tokens]:
            yield [token]


def run_lines(monkeypatch, capsys, config: Config, text: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    result = chat.main(config)
    captured = capsys.readouterr()
    return result, captured.out, captured.err


# ----------------------------------------------------------------------------------------------------------------------
# What the model reads


@pytest.mark.parametrize("template, closing", [("baby", ""), ("chatml", ""), ("llama2", " "), ("chatml-65b", "\n")])
@pytest.mark.parametrize("system", ["", "你是一只小羊驼。"])
def test_the_model_reads_exactly_what_render_gives(tokenizer, template, closing, system):
    talk = conversation(tokenizer, template, system, window=512)
    talk.model = Script(tokenizer, "巴黎。" + closing, window=512)  # it has learned to write what stands before the end of its turn
    for question in ("法国的首都？", "一加一？"):
        "".join(talk.answer(question, talk.read(question)[0]))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "法国的首都？"}, {"role": "assistant", "content": "巴黎。"},
                 {"role": "user", "content": "一加一？"}]  # fmt: skip
    expected, _ = tokenizer.render(messages, template=template, add_generation_prompt=True)
    assert talk.model.prompts[1] == expected
    # and what it will have read after the second answer begins like the training row of the whole conversation
    row, mask = tokenizer.render([*messages, {"role": "assistant", "content": "巴黎。"}], template=template)
    assert row[: len(expected)] == expected and mask[len(expected)] == 1
    assert set(talk.stop_ids) == set(tokenizer.stop_ids(template))


def test_a_base_model_continues_the_text_and_remembers_nothing(tokenizer):
    talk = conversation(tokenizer, None, system="unused")
    talk.model = Script(tokenizer, "处处闻啼鸟。")
    for text in ("春眠不觉晓，", "一加一"):
        assert "".join(talk.answer(text, talk.read(text)[0])) == "处处闻啼鸟。"
    assert talk.model.prompts == [tokenizer.encode("春眠不觉晓，"), tokenizer.encode("一加一")]
    assert talk.turns == [] and talk.stop_ids == [tokenizer.eos_id]


def test_streamed_pieces_are_whole_characters_and_equal_the_decoded_answer(tokenizer):
    talk = conversation(tokenizer)
    talk.model = Script(tokenizer, "龘靐🦙é")  # none of them in the vocabulary: several byte tokens each
    pieces = list(talk.answer("？", talk.read("？")[0]))
    assert "".join(pieces) == "龘靐🦙é" and "\ufffd" not in "".join(pieces)
    assert len(talk.model.answer) >= 12 and sorted(filter(None, pieces)) == sorted("龘靐🦙é")


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    talk = conversation(tokenizer)
    talk.model = Script(tokenizer, "🦙")
    talk.model.answer = talk.model.answer[:-1]
    assert "".join(talk.answer("？", talk.read("？")[0])) == "\ufffd"


def test_answers_are_the_models_greedy_tokens(tokenizer):
    talk = conversation(tokenizer)
    ids, _ = talk.read("法国的首都？")
    said = "".join(talk.answer("法国的首都？", ids))
    text = list(ids)
    for _ in range(16):  # by hand: the whole text again for every token
        token = int(talk.model(torch.tensor([text]))[0, -1].argmax())
        if token in tokenizer.stop_ids("baby"):
            break
        text.append(token)
    assert tokenizer.decode(text[len(ids) :]) == said and talk.tokens == len(text) - len(ids) > 0


def test_a_seed_repeats_an_answer_and_chance_does_not(tokenizer):
    talk = conversation(tokenizer, None, temperature=5.0, top_p=1.0, seed=7)
    ids, _ = talk.read("一加一")
    said = ["".join(talk.answer("一加一", ids)) for _ in range(2)]
    assert said[0] == said[1]
    talk.settings["seed"] = None
    torch.manual_seed(0)
    by_chance = "".join(talk.answer("一加一", ids))
    torch.manual_seed(0)  # a fresh process starts like this: chance must not mean torch's fixed seed
    assert by_chance != "".join(talk.answer("一加一", ids))


# ----------------------------------------------------------------------------------------------------------------------
# The window


def test_the_oldest_turns_are_forgotten_and_the_system_text_stays(tokenizer):
    talk = conversation(tokenizer, system="你是小羊驼。", window=96, max_new_tokens=20)
    talk.model = Script(tokenizer, "巴黎。", window=96)
    forgotten = []
    for i in range(12):
        question = f"第{i}问：法国的首都？"
        ids, gone = talk.read(question)
        forgotten.append(gone)
        assert len(ids) + 20 <= 96
        "".join(talk.answer(question, ids))
        assert talk.model.prompts[-1][: len(tokenizer.encode("你是小羊驼。"))] == tokenizer.encode("你是小羊驼。")
    assert forgotten[0] == 0 and sum(forgotten) == 12 - len(talk.turns) > 3
    assert talk.turns[-1][0].startswith("第11问") and talk.turns[0][0].startswith(f"第{12 - len(talk.turns)}问")
    kept = tokenizer.decode(talk.model.prompts[-1])
    assert "第0问" not in kept and "第10问" in kept
    # no turn went without need: with one more of the old ones it would not have fitted
    one_more = [("第0问：法国的首都？", "巴黎。"), *talk.turns[:-1]]
    assert len(talk.ids(one_more, "第11问：法国的首都？")) + 20 > 96


def test_a_long_answer_is_promised_half_the_window_and_gets_what_is_left(tokenizer):
    talk = conversation(tokenizer, window=96, max_new_tokens=4096)
    talk.model = Script(tokenizer, "好" * 200, window=96)
    ids, _ = talk.read("一")
    "".join(talk.answer("一", ids))
    assert talk.model.room == [96 - len(ids)] and talk.cut and talk.tokens == 96 - len(ids)
    ids, gone = talk.read("二")
    assert gone == 1 and talk.turns == [] and len(ids) <= 48


def test_a_message_longer_than_the_window_is_an_error_that_forgets_nothing(tokenizer):
    talk = conversation(tokenizer, window=64, max_new_tokens=8)
    talk.turns = [("一？", "二。")]
    with pytest.raises(UserError, match=r"this message takes \d+ tokens, but the model reads 64"):
        talk.read("山" * 80)
    assert talk.turns == [("一？", "二。")]
    talk.system = "山" * 80
    with pytest.raises(UserError, match="with the system text"):
        talk.read("一？")


def test_the_last_token_of_the_window_can_be_used(tokenizer):
    talk = conversation(tokenizer, None, window=64)
    text = "7" * 63
    assert len(tokenizer.encode(text)) == 63
    "".join(talk.answer(text, talk.read(text)[0]))
    assert talk.tokens <= 1
    with pytest.raises(UserError):
        talk.read("7" * 64)


def test_stopping_an_answer_keeps_what_was_said(tokenizer):
    talk = conversation(tokenizer)
    talk.model = Script(tokenizer, "春眠不觉晓，处处闻啼鸟。")
    pieces = talk.answer("背诗", talk.read("背诗")[0])
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.turns == [("背诗", said)]


def test_a_turn_without_an_answer_is_not_remembered(tokenizer):
    talk = conversation(tokenizer)
    talk.model = Script(tokenizer, "")
    assert "".join(talk.answer("？", talk.read("？")[0])) == ""
    assert talk.turns == [] and not talk.cut
    talk.read("还在吗？")  # can still be rendered


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_set_changes_a_setting_and_shows_all():
    settings = dict(SETTINGS)
    assert set_sampling(settings, ["temperature", "0.7"]) == "temperature 0.7" and settings["temperature"] == 0.7
    assert set_sampling(settings, ["top-k", "40"]) == "top_k 40" and settings["top_k"] == 40
    assert set_sampling(settings, ["seed", "5"]) == "seed 5" and settings["seed"] == 5
    assert set_sampling(settings, ["seed", "none"]) == "seed none" and settings["seed"] is None
    shown = set_sampling(settings, [])
    expected = {name: "none" if value is None else str(value) for name, value in settings.items()}
    assert dict(line.split() for line in shown.splitlines()) == expected and list(expected) == list(chat.SAMPLING)


@pytest.mark.parametrize("words", ["temperature warm", "temperature -1", "temperature nan", "temperature inf",
                                   "top_p 0", "top_p 1.5", "top_k 1.5", "top_k -1", "min_p 2", "repetition_penalty 0",
                                   "seed -1", "max_new_tokens 0", "max_new_tokens none", "top_p 0.5 0.6"])  # fmt: skip
def test_set_refuses_in_plain_words(words):
    settings = dict(SETTINGS)
    with pytest.raises(UserError, match=words.split()[0]):
        set_sampling(settings, words.split())
    assert settings == SETTINGS


def test_set_names_the_settings_there_are():
    with pytest.raises(UserError, match=r"there is no setting beams; there are temperature, top_p"):
        set_sampling(dict(SETTINGS), ["beams", "4"])


def test_flags_are_held_to_the_same_ranges():
    problems = Config(temperature=-1.0, top_p=0.0, seed=-3, prompt=" ").problems()
    assert [problem.split()[0] for problem in problems] == ["--temperature", "--top-p", "--seed", "--prompt"]
    assert Config().problems() == []


def test_reset_system_help_and_the_unknown(tokenizer):
    talk = conversation(tokenizer, system="旧")
    talk.turns, talk.forgetting = [("一", "二")], True
    command(talk, "/reset")
    assert talk.turns == [] and talk.system == "旧" and not talk.forgetting
    assert "新的话" in command(talk, "/system 新的话") and talk.system == "新的话"
    assert tokenizer.decode(talk.read("一")[0]).startswith("新的话")
    command(talk, "/system")
    assert talk.system == "" and "新的话" not in tokenizer.decode(talk.read("一")[0])
    assert all(usage in command(talk, "/help") for usage in chat.COMMANDS)
    with pytest.raises(UserError, match="unknown command /rest; there are /reset, /system"):
        command(talk, "/rest")


# ----------------------------------------------------------------------------------------------------------------------
# The program


def test_piped_lines_are_turns_and_mistakes_do_not_end_the_talk(sft_dir, monkeypatch, capsys):
    config = Config(model=sft_dir, temperature=0.0, max_new_tokens=4, device="cpu", dtype="fp32")
    text = "\n".join(["法国的首都？", "", "/bogus", "/set top_p 9", "山" * 400, "/set max_new_tokens 2", "一加一？",
                      "/quit", "没有了"])  # fmt: skip
    result, out, err = run_lines(monkeypatch, capsys, config, text)
    assert result["turns"] == 2 and 0 < result["new_tokens"] <= 6
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "unknown command /bogus" in errors[0] and "top_p" in errors[1] and "reads 128" in errors[2]
    assert "max_new_tokens 2" in err and "/bogus" not in out and ">" not in out and "\033" not in out + err


def test_a_line_that_begins_with_two_slashes_is_a_message(sft_dir, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(chat, "reply", lambda talk, text: seen.append(text) or "")
    run_lines(monkeypatch, capsys, Config(model=sft_dir, device="cpu"), "//etc\n/reset\n你好\n")
    assert seen == ["/etc", "你好"]


def test_the_note_about_forgetting_comes_once(tokenizer, capsys):
    talk = conversation(tokenizer, window=48, max_new_tokens=16)
    talk.model = Script(tokenizer, "巴黎。", window=48)
    for i in range(6):
        chat.reply(talk, f"第{i}问：法国的首都？")
    captured = capsys.readouterr()
    assert captured.err.count("forgotten") == 1 and captured.out == "巴黎。\n" * 6


def test_a_base_model_says_so(base_dir, monkeypatch, capsys):
    config = Config(model=base_dir, system="你好", temperature=0.0, max_new_tokens=3, device="cpu", dtype="fp32")
    result, out, err = run_lines(monkeypatch, capsys, config, "春眠不觉晓，\n/system 呀\n")
    assert result["turns"] == 1 and err.count("base model") == 3  # at the start, for --system, for /system
    assert "continues your text" in err and "base model" not in out


def test_template_none_makes_any_model_continue(sft_dir, tokenizer):
    talk = chat.load(Config(model=sft_dir, template="none", device="cpu"))
    assert talk.ids([], "一") == tokenizer.encode("一")
    assert chat.load(Config(model=sft_dir, device="cpu")).template == "baby"


def test_rope_scaling_widens_the_window(sft_dir):
    talk = chat.load(Config(model=sft_dir, rope_scaling="yarn", rope_factor=4.0, device="cpu"))
    assert talk.window == 4 * 128 and talk.model.config.rope_scaling["rope_type"] == "yarn"


def test_escape_characters_do_not_reach_the_terminal(tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    talk = conversation(tokenizer)
    talk.model = Script(tokenizer, "a\x1b[2Jb\x9bc\n")
    monkeypatch.setattr(sys, "stdout", Terminal())
    chat.reply(talk, "？")
    assert sys.stdout.getvalue() == "a␛[2Jb\ufffdc\n\n"


def chat_process(*flags, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "", "LC_ALL": "C"}
    return subprocess.run([sys.executable, ROOT / "chat.py", *map(str, flags)], capture_output=True, env=environment,
                          timeout=120, **options)  # fmt: skip


@pytest.mark.slow
def test_one_shot_prints_the_answer_and_nothing_else(sft_dir, tokenizer):
    done = chat_process("--model", sft_dir, "--prompt", "法国的首都？", "--temperature", 0, "--max-new-tokens", 8,
                        "--dtype", "fp32", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    talk = Conversation(tiny(tokenizer), tokenizer, "baby", SETTINGS | {"max_new_tokens": 8})
    assert done.stdout.decode() == "".join(talk.answer("法国的首都？", talk.read("法国的首都？")[0])) + "\n"


@pytest.mark.parametrize("flags, message", [
    (["--model", "no/such/model", "--prompt", "x"], "no/such/model does not exist"),
    (["--model", "SFT", "--prompt", "山" * 400], "the model reads 128"),
    (["--model", "SFT", "--prompt", "", "--top-p", "2", "--beams", "3"], "--prompt is empty"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(sft_dir, flags, message):
    statuses, out, err = ended("chat.py", *[sft_dir if flag == "SFT" else flag for flag in flags])
    lines = err.splitlines()
    assert statuses == [2] and out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_then_quits(sft_dir, tmp_path):
    """The real program on a pseudo-terminal: prompt, answer, Ctrl-C, next answer, Ctrl-C at the prompt."""
    import pty

    master, slave = pty.openpty()
    flags = ["--model", sft_dir, "--max-new-tokens", "100", "--device", "cpu", "--dtype", "fp32", "--temperature", "1"]
    child = ("import sys, time, chat\nfrom model import Llama\nreal = Llama.generate\n"
             "def slow(*a, **k):\n    for step in real(*a, **(k | {'stop_ids': ()})):\n"
             "        time.sleep(0.05)\n        yield step\n"
             "Llama.generate = slow\nfrom settings import command_line\n"
             "command_line(chat.main, chat.Config, sys.argv[1:])")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", child, *map(str, flags)], stdin=slave, stdout=slave,
                               stderr=slave, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    os.close(slave)
    screen = b""

    def until(text: bytes, start: int) -> None:
        nonlocal screen
        deadline = time.time() + 60
        while text not in screen[start:]:
            assert time.time() < deadline, screen.decode("utf-8", "replace")
            screen += os.read(master, 4096)

    try:
        until(b"> ", 0)
        for turn in range(2):
            start = len(screen)
            os.write(master, f"{turn}，法国的首都？\n".encode())
            until(b"\n", start)
            time.sleep(0.5)  # ten tokens of a hundred
            process.send_signal(signal.SIGINT)
            until(b"stopped", start)
            until(b"> ", len(screen) - 4)
        deadline = time.time() + 60
        while process.poll() is None:  # a Ctrl-C between the prompt and readline's wait for a key needs a second one
            assert time.time() < deadline
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(master)
    assert b"Traceback" not in screen
