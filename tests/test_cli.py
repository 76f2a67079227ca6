import csv
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_folder import CAPTIONS, LABELS, NAMES, write_folder, write_table
from support.training_runs import TWO_PROCESSES

from hf_mmclf import PRESETS, DataArguments, Predictor, compare, pipeline
from hf_mmclf.cli import main
from hf_mmclf.evaluation.report import report, report_text
from hf_mmclf.hub import push as hub
from hf_mmclf.inference.comparison import comparison_text
from hf_mmclf.inference.predictions import prediction_lines

SCRIPT = Path(sys.executable).with_name("hf-mmclf")
COMMANDS = ["train", "evaluate", "compare", "predict", "push", "export", "presets", "cache"]
IDS = {"1": "person", "3": "traffic light", "10": "dog"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: str(write_folder(tmp_path_factory.mktemp(kind), kind)) for kind in ("both", "image", "text")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(here):
    return write_table(here)


def error_of(argv, capsys):
    """The message of a failed command, which must be one line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    if isinstance(caught.value.code, str):  # Python prints it and exits with 1
        message = caught.value.code
        assert message.startswith(f"hf-mmclf {argv[0]}: error: ")
    else:
        assert caught.value.code == 2
        usage, _, message = capsys.readouterr().err.partition(": error: ")
        assert usage.startswith(f"usage: hf-mmclf {argv[0]} ")
    assert "\n" not in message.strip() and "Traceback" not in message
    return message


def scores_of(folder, table, rows=None):
    predictor = Predictor.load(folder)
    prepared = predictor.prepare(DataArguments(str(table)))
    data = prepared.splits["train"] if rows is None else prepared.splits["train"].select(rows)
    return data, predictor.scores(data, prepared.folder), predictor.model.config


def references_of(rows):
    return np.array([[label in LABELS[row].split() for label in IDS] for row in rows])


class TestMain:
    @pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
    def test_usage_names_all_commands(self, argv, capsys):
        main(argv)
        text = capsys.readouterr().out
        assert all(f"\n  {command} " in text for command in COMMANDS)

    def test_version(self, capsys):
        main(["--version"])
        assert capsys.readouterr().out == f"hf-mmclf {version('hf_mmclf')}\n"

    def test_unknown_command(self):
        with pytest.raises(SystemExit, match="unknown command 'trian'; expected one of train, evaluate, compare"):
            main(["trian"])

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_each_command(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and text.startswith(f"usage: hf-mmclf {command}")
        assert "--validation_fraction" not in text or command == "train"
        if command in ("evaluate", "compare", "predict", "embed", "gallery"):
            words, folders = " ".join(text.split()), "A B" if command == "compare" else "FOLDER"
            assert (
                f"hf-mmclf {command} {folders} [--argument" in words
                and "--image_dir" in words
                and "--image-dir" not in words
            )
            assert words.count("metrics.json") == (1 if command == "evaluate" else 0)

    @pytest.mark.parametrize(
        "argv, message",
        [
            (["train", "--learnin_rate", "1"], "did you mean '--learning_rate'?"),
            (["train", "--data", "none.csv"], "'none.csv': no such file or folder"),
            (["train", "--width", "0"], "error: width is 0; expected at least 1"),
            (["train", "--dropout", "2"], "error: dropout is 2.0; expected a probability in [0, 1)"),
            (["train", "--output_dir", "."], ". is not empty; give another --output_dir"),
            (["evaluate"], "the following arguments are required: folder"),
            (["evaluate", "none"], "none: no model here (no config.json)"),
            (["evaluate", "none", "--output", "table.csv"], "table.csv: expected a name that ends in .json"),
            (["evaluate", "none", "--split", "val"], "invalid choice: 'val'"),
            (["evaluate", "none", "--texts", "a dog"], "unknown argument '--texts'; did you mean '--text"),
            (["compare", "none"], "the following arguments are required: b"),
            (["compare", "none", "."], "none: no model here (no config.json)"),
            (["compare", "none", ".", "--output", "c.csv"], "c.csv: expected a name that ends in .json"),
            (["predict", "none", "--batchsize", "3"], "unknown argument '--batchsize'; did you mean '--batch_size'?"),
            (["predict", "none", "--texts", "a dog"], "none: no model here (no config.json)"),
            (["predict", "none"], "expected either --data (a table) or --images and --texts"),
            (["predict", "none", "--texts", "a", "--data", "x"], "expected either --data (a table) or"),
            (["predict", "none", "--texts", "a", "--output", "p.txt"], "p.txt: expected a name that ends in .csv or"),
            (["predict", "none", "--images", "a.jpg", "b.jpg"], "no such image: a.jpg, b.jpg"),
            (["embed", "none"], "expected --data, the table whose rows are embedded"),
            (["embed", "none", "--data", "x.csv", "--output", "v.csv"], "v.csv: expected a name that ends in .npy"),
            (["embed", "none", "--data", "x.csv", "--test_data", "y.csv"], "--test_data has no effect, because embed"),
            (["gallery", "none", "--output", "g.txt"], "g.txt: expected a name that ends in .html"),
            (["presets", "--all"], "unknown argument '--all'"),
        ],
    )
    def test_errors_are_one_line(self, argv, message, here, capsys):
        (here / "file").touch()
        assert message in error_of(argv, capsys)

    def test_script_exits_with_a_message_and_no_traceback(self, here):
        command = [SCRIPT, "predict", "none", "--texts", "a dog"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith("hf-mmclf predict: error: none: no model here")
        assert "Traceback" not in done.stderr


def test_presets_prints_all_systems_with_the_posters_figures(capsys):
    main(["presets"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "preset" and header.split()[-1] == "F1"
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, preset in zip(lines, PRESETS.values(), strict=True):
        poster = preset.poster
        expected = [f"{poster.megabytes:.2f}", f"{poster.f1_validation:.4f}"] if poster else ["-", "-"]
        assert line.split()[-2:] == expected


class TestEvaluate:
    def test_prints_the_table_and_writes_all_figures(self, folders, table, here, capsys):
        main(["evaluate", folders["both"], "--data", str(table), "--output", "new/metrics.json"])
        out = capsys.readouterr().out
        predictor = Predictor.load(folders["both"])
        rows, scores, config = scores_of(folders["both"], table)
        expected = {"train": report(scores, references_of(range(5)), config, texts=CAPTIONS)}
        expected["train"]["ablations"] = predictor.evaluate(rows, here)["ablations"]
        written = json.loads((here / "new" / "metrics.json").read_text())
        assert written == json.loads(json.dumps(expected))
        assert report_text(expected) in out and out.endswith("All figures: new/metrics.json\n")

    def test_ablations_can_be_left_out(self, folders, table, here, capsys):
        main(["evaluate", folders["both"], "--data", str(table), "--no_ablations"])
        assert "ablations" not in json.loads((here / "metrics.json").read_text())["train"]
        assert "images only" not in capsys.readouterr().out

    def test_writes_metrics_json_here_but_never_over_the_training_runs(self, table, here, monkeypatch, capsys):
        folder = write_folder(here / "model", "text")
        (folder / "metrics.json").write_text("training")
        main(["evaluate", "model", "--data", "train.csv"])
        assert "train" in json.loads((here / "metrics.json").read_text())
        monkeypatch.chdir(folder)
        assert "metrics.json is a file of the model" in error_of(["evaluate", ".", "--data", str(table)], capsys)
        assert (folder / "metrics.json").read_text() == "training"

    @pytest.mark.parametrize("flags, name, rows", [([], "test", [2, 4]), (["--split", "train"], "train", [0, 1, 3])])
    def test_table_that_training_split_is_judged_by_what_it_held_out(self, flags, name, rows, table, here, capsys):
        folder = write_folder(here / "model", "text")
        lines = [f"{'test' if row in (2, 4) else 'train'},train.csv:{row + 2}\n" for row in range(5)]
        (folder / "splits.csv").write_text("split,row\n" + "".join(lines))
        main(["evaluate", "model", "--data", "train.csv", *flags])
        figures = json.loads((here / "metrics.json").read_text())
        own, scores, config = scores_of(folder, table, rows)
        assert list(figures) == [name]
        assert figures[name] == json.loads(
            json.dumps(report(scores, references_of(rows), config, texts=own["text"][:]))
        )

    def test_unlabelled_rows(self, folders, here, capsys):
        table = write_table(here, "test.csv", labelled=False)
        assert "these rows have no labels" in error_of(["evaluate", folders["text"], "--data", str(table)], capsys)
        assert not (here / "metrics.json").exists()

    def test_label_that_the_model_does_not_know(self, folders, table, capsys):
        table.write_text(table.read_text().replace("3.jpg,3", "3.jpg,3 17"))
        message = error_of(["evaluate", folders["text"], "--data", str(table)], capsys)
        assert "train.csv:5: unknown label '17'" in message


class TestCompare:
    def test_prints_what_the_function_finds_and_writes_all_of_it(self, folders, table, here, capsys):
        write_folder(here / "text", "text", threshold=0.85)
        main(["compare", "text", folders["both"], "--data", "train.csv", "--output", "new/c.json"])
        out = capsys.readouterr().out
        models = [Predictor.load(folder) for folder in ("text", folders["both"])]
        expected = compare(*models, DataArguments("train.csv"))
        assert json.loads((here / "new" / "c.json").read_text()) == json.loads(json.dumps(expected))
        assert out == f"{comparison_text(expected)}\n\nAll figures and rows: new/c.json\n"
        assert expected["only_one_right"]  # else the table would say nothing

    def test_writes_nothing_unasked_and_tells_bad_images(self, folders, table, here, capsys):
        (here / "1.jpg").write_bytes(b"")
        before = set(here.iterdir())
        main(["compare", folders["text"], folders["image"], "--data", "train.csv", "--bad_images", "skip"])
        said = capsys.readouterr()
        assert "4 rows of train; 1 that only one model takes are left out" in said.out
        assert "Image left out: train.csv:3: the file is empty\n" in said.err and set(here.iterdir()) == before


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_embed_writes_the_vectors_of_the_pipeline(kind, folders, here, capsys):
    table = write_table(here)
    main(["embed", folders[kind], "--data", "train.csv", "--output", "out/v.npy", "--batch_size", "2"])
    vectors = np.load("out/v.npy")
    size = f"{vectors.shape[1]} numbers each"
    assert capsys.readouterr().out == f"5 rows of train, {size}: out/v.npy\n"
    assert [file.name for file in (here / "out").iterdir()] == ["v.npy"]
    rows = {"image": [str(table.parent / f"{row}.jpg") for row in range(5)], "text": CAPTIONS}
    rows = {name: values for name, values in rows.items() if kind in ("both", name)}
    np.testing.assert_allclose(vectors, pipeline(folders[kind]).embed(**rows), atol=1e-5)


class TestPredict:
    @pytest.mark.parametrize("labelled", [False, True])
    @pytest.mark.parametrize("kind", ["both", "image", "text"])
    def test_table_to_the_competitions_form(self, kind, labelled, folders, here, capsys):
        """Labels of the table are not even read: here is one that the model does not know."""
        table = write_table(here, "test.csv", labelled)
        table.write_text(table.read_text().replace("3.jpg,3", "3.jpg,3 17"))
        main(["predict", folders[kind], "--data", "test.csv", "--output", "out/p.csv"])
        assert capsys.readouterr().out == "5 rows of train: out/p.csv\n"
        _, scores, config = scores_of(folders[kind], write_table(here))
        with open("out/p.csv", newline="") as file:
            assert file.readline() == "ImageID,Labels\n"
            written = dict(csv.reader(file))
        hits = scores >= config.threshold
        expected = [" ".join(label for label, hit in zip(IDS, row, strict=True) if hit) for row in hits]
        assert written == {f"{row}.jpg": labels for row, labels in enumerate(expected)}
        assert len(set(expected)) > 1

    def test_table_to_json_lines(self, folders, table, here):
        main(["predict", folders["both"], "--data", "train.csv", "--output", "p.jsonl", "--batch_size", "2"])
        _, scores, config = scores_of(folders["both"], table)
        lines = [json.loads(line) for line in (here / "p.jsonl").read_text().splitlines()]
        assert [line["image"] for line in lines] == [f"{row}.jpg" for row in range(5)]
        for line, row in zip(lines, scores, strict=True):
            assert line["scores"] == pytest.approx(dict(zip(NAMES.values(), map(float, row), strict=True)), abs=1e-5)
            assert set(line["labels"]) == {name for name, score in line["scores"].items() if score >= 0.5}

    @pytest.mark.parametrize("in_folder", [False, True])
    def test_images_and_texts_to_the_screen(self, in_folder, folders, here, capsys):
        (here / "images").mkdir()
        table = write_table(here / "images")
        names = [f"{row}.jpg" if in_folder else f"images/{row}.jpg" for row in (4, 1)]
        flags = ["--images", *names, "--texts", CAPTIONS[4], CAPTIONS[1]]
        main(["predict", folders["both"], *flags, *(["--image_dir", "images"] if in_folder else [])])
        rows, scores, config = scores_of(folders["both"], table, [4, 1])
        expected = [line.partition(": ")[2] for line in prediction_lines(rows, scores, config)]
        assert expected[0] != expected[1]
        assert capsys.readouterr().out.splitlines() == [f"{n}: {e}" for n, e in zip(names, expected, strict=True)]

    @pytest.mark.parametrize("kind, what", [("both", "--images"), ("both", "--texts"), ("image", "--images")])
    def test_one_modality_is_enough(self, kind, what, folders, table, capsys):
        values = ["0.jpg", "1.jpg"] if what == "--images" else CAPTIONS[:2]
        main(["predict", folders[kind], what, *values])
        lines = capsys.readouterr().out.splitlines()
        names = values if what == "--images" else ["row 1", "row 2"]
        assert [line.partition(": ")[0] for line in lines] == names

    @pytest.mark.parametrize(
        "kind, flags, message",
        [
            ("both", ["--images", "0.jpg", "1.jpg", "--texts", "a"], "2 images, but 1 texts; expected one"),
            ("both", ["--images", "0.jpg", "none.jpg"], "error: no such image: none.jpg"),
            ("image", ["--images", "notes.jpg"], "error: row 1: cannot read the "),
            ("image", ["--texts", "a dog"], "is given, but the model has no"),
            ("text", ["--images", "0.jpg"], "is given, but the model has no"),
            ("text", ["--data", "train.csv", "--split", "test"], "no split 'test'; the source has train"),
            (
                "text",
                ["--data", "train.csv", "--text_column", "caption"],
                "no column 'caption'; did you mean 'Caption'?",
            ),
        ],
    )
    def test_what_cannot_be_predicted(self, kind, flags, message, folders, table, here, capsys):
        (here / "notes.jpg").write_text("not an image")
        assert message in error_of(["predict", folders[kind], *flags, "--output", "p.csv"], capsys)
        assert not (here / "p.csv").exists()

    def test_bad_image_in_a_worker_process_is_one_line_too(self, folders, table, here, capsys):
        (here / "4.jpg").write_text("not an image")
        argv = ["predict", folders["image"], "--data", "train.csv", "--batch_size", "1"]
        message = error_of(argv, capsys)
        assert message.startswith("hf-mmclf predict: error: train.csv:6: cannot read the ") and "4.jpg" in message
        assert "--bad_images missing keeps them" in message

    @pytest.mark.parametrize("command, flags", [("predict", ["--output", "p.csv"]), ("evaluate", [])])
    @pytest.mark.parametrize("policy, fate", [("skip", "left out"), ("missing", "taken as missing")])
    def test_bad_images_that_are_put_up_with_are_listed(
        self, command, flags, policy, fate, folders, table, here, capsys
    ):
        (here / "1.jpg").write_bytes(b"")
        main([command, folders["both"], "--data", "train.csv", "--bad_images", policy, *flags])
        assert f"Image {fate}: train.csv:3: the file is empty\n" in capsys.readouterr().err
        rows = 4 if policy == "skip" else 5
        if command == "predict":
            assert len((here / "p.csv").read_text().splitlines()) == 1 + rows
        else:
            assert json.loads((here / "metrics.json").read_text())["train"]["rows"] == rows


def test_image_upright_and_in_any_mode(folders, here, capsys):
    """What a person has on the disk: the command decodes as training does, not as `PIL.Image.open` alone."""
    upright = Image.new("RGB", (30, 20), "red")
    upright.paste("blue", (0, 0, 15, 20))
    upright.save("upright.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save("turned.png", exif=exif)
    main(["predict", folders["image"], "--images", "upright.png", "turned.png"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.partition(": ")[2] == second.partition(": ")[2]


class TestPush:
    """What is sent is tested with the function; here, that the flags reach it."""

    @pytest.fixture
    def pushed(self, monkeypatch):
        calls = []
        monkeypatch.setattr(hub, "push_to_hub", lambda **arguments: calls.append(arguments))
        return calls

    def test_flags(self, pushed):
        main(["push", "outputs/demo", "user/toys"])
        main(["push", "a", "b/c", "--private", "--revision", "next", "--tag", "v1", "--message", "Better"])
        main(["push", "a", "b/c", "--public"])
        nothing = dict(private=None, revision=None, tag=None, message=None)
        assert pushed == [
            dict(nothing, folder="outputs/demo", repo_id="user/toys"),
            dict(folder="a", repo_id="b/c", private=True, revision="next", tag="v1", message="Better"),
            dict(nothing, folder="a", repo_id="b/c", private=False),
        ]

    def test_errors_are_one_line(self, folders, capsys):
        assert "expected user/name" in error_of(["push", folders["both"], "toys"], capsys)
        assert "no model here" in error_of(["push", "nowhere", "user/toys"], capsys)
        assert "not allowed with" in error_of(["push", "a", "b/c", "--private", "--public"], capsys)


class TestExport:
    def test_with_rows_of_a_table(self, folders, table, here, capsys):
        main(["export", folders["text"], "--onnx", "--int8", "--output", "out", "--data", "train.csv"])
        assert {file.name for file in (here / "out").iterdir()} == {"model.onnx", "model_int8.onnx", "predict.py"}
        said = capsys.readouterr().out
        assert "model_int8.onnx" in said and said.endswith("\nOutput folder: out\n") and "f1" in said.lower()

    def test_errors_are_one_line(self, folders, capsys):
        assert "no model here" in error_of(["export", "nowhere", "--onnx"], capsys)
        assert "--onnx" in error_of(["export", folders["both"]], capsys)
        error = error_of(["export", folders["both"], "--onnx", "--split", "test", "--batch_size", "2"], capsys)
        assert "--batch_size, --split have no effect, because --data is not given" in error


def test_predict_on_one_image_prints_its_labels_and_nothing_else(folders, table, here):
    command = ["predict", str(folders["both"]), "--images", "3.jpg", "--texts", CAPTIONS[3]]
    script = f"from hf_mmclf.cli import main\nmain({command})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1 and done.stdout.startswith("3.jpg: ")


@pytest.mark.slow
def test_two_processes_write_what_one_does(folders, table, here):
    """Also where rows do not divide by batches and processes, and where there are fewer rows than processes."""
    runs = [["predict", "--data", "train.csv", "--batch_size", size] for size in ("1", "2", "64")]
    runs.append(["predict", "--images", "3.jpg", "--texts", CAPTIONS[3]])
    runs.append(["evaluate", "--data", "train.csv", "--batch_size", "2"])
    runs.append(["compare", folders["text"], "--data", "train.csv", "--batch_size", "2"])

    def commands(prefix):
        for number, (command, *flags) in enumerate(runs):
            for suffix in (".csv", ".jsonl") if command == "predict" else (".json",):
                yield [command, folders["both"], *flags, "--output", f"{prefix}{number}{suffix}"]

    Path("several.py").write_text(
        f"from hf_mmclf.cli import main\nfor argv in {list(commands('two'))}:\n    main(argv)\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES]
    done = subprocess.run(
        [*launcher, "several.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows of train: two") == 8 and done.stdout.count("All figures: two") == 1
    assert done.stdout.count("All figures and rows: two") == 1
    for argv in commands("one"):
        main(argv)
        alone, both = (Path(argv[-1].replace("one", name)).read_text() for name in ("one", "two"))
        if argv[-1].endswith(".jsonl"):
            for one, two in zip(map(json.loads, alone.splitlines()), map(json.loads, both.splitlines()), strict=True):
                assert two.pop("scores") == pytest.approx(one.pop("scores"), abs=2e-6)  # written with six digits
                assert two == one
        elif argv[0] == "evaluate":  # of whose figures one depends on the last digits of the scores
            one, two = (json.loads(text)["train"] for text in (alone, both))
            for at in ("at_0.5", "fitted"):
                assert two[at].pop("ece") == pytest.approx(one[at].pop("ece"), abs=1e-6)
            assert two == one
        else:
            assert both == alone
