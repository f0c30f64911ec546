"""Helpers of the report's tests: a parser of its page, made-up log rows and evaluations."""

import json
import re
from html.parser import HTMLParser

from ds_classifier.report.page import write_report

HOSTILE = '<script>alert("x")</script>&"\''
VOID = {"meta", "link", "img", "br"}
SVG_ENDS_ITSELF = {"g", "path", "use", "rect"}


class Page(HTMLParser):
    """A parsed page: its text, the addresses it would fetch. It asserts that the tags match."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.addresses = [], [], [], []
        self.sections = {}  # id -> text
        self.feed(re.sub(r'<span class="flag">(.*?)</span>', r"\1", html))  # not texts of their own
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        assert tag in SVG_ENDS_ITSELF

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "style" for tag, _ in self.open):
            assert "url(" not in data
            assert "@import" not in data
            return
        self.texts.append(data)
        section = next((a["id"] for tag, a in self.open if tag == "section"), "")
        self.sections[section] = self.sections.get(section, "") + data + " "

    @property
    def text(self):
        return " ".join(self.texts)


def opened(run) -> Page:
    """Write and parse a run's page, and check what must hold for every page."""
    html = write_report(run).read_text()
    parsed = Page(html)
    assert "script" not in parsed.tags
    for address in parsed.addresses:
        assert address.startswith(("data:", "#")), address
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"base64,\S+", "", html))
    assert "cannot be shown" not in parsed.text
    return parsed


def training_row(step, loss, **more):
    row = {"step": step, "samples": 64 * step, "train_loss": loss, "train_acc@1": 0.5, "lr": 1e-3}
    row |= {f"train_acc@1_q{q}": 0.9 - 0.2 * q for q in range(4)}
    row |= {"grad_norm": 1.5, "lg_loss_scale": 0.0, "images_per_sec": 100.0, "skipped_steps": 0}
    row["window_samples"] = 640
    return row | {"data_wait_frac": 0.01, "bad_samples": 0} | more


def validation_row(step, loss, accuracy=0.6):
    row = {"step": step, "val_loss": loss, "val_acc@1": accuracy, "val_acc@5": 0.9}
    return row | {"val_acc@1_t0": 0.8, "val_loss_t0": 0.3, "val_seconds": 1.0}


def write_log(run, rows):
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(step, classes, confusion, t0_accuracy=0.9):
    """Return an evaluation at three levels, in the form that evaluate.py writes.

    confusion: number of images by (label, predicted class).
    """
    samples = sum(confusion.values())
    level = dict(samples=samples, not_finite=0, loss=0.5, grad_norm=0.1, ece=0.02)
    level |= {"correct@1": 1, "correct@5": 1, "acc@1": 0.5, "acc@5": 0.8}
    levels = [
        level | {"t": t, "timestep": t, "log_snr": snr, "acc@1": accuracy}
        for t, snr, accuracy in ((0, 10.0, t0_accuracy), (500, 0.0, 0.5), (999, -10.0, None))
    ]
    counts = [0] * len(classes)
    for (label, _), count in confusion.items():
        counts[label] += count
    per_class = {"samples": counts, "correct@1": [c // 2 for c in counts]}
    bins = [{"bin": 3, "samples": 4, "correct": 1, "confidence": 0.25}]
    pairs = list(confusion)
    return {
        "format": "ds_classifier evaluation",
        "name": f"step-{step:08d}",
        "step": step,
        "precision": "fp32",
        "classes": classes,
        "data": {"samples": samples},
        "classifier": {
            "uniform_t": level,
            "levels": levels,
            "per_class": [{"t": None, **per_class}, {"t": 0, **per_class}],
            "reliability": [{"t": None, "bins": bins}, {"t": 0, "bins": []}],
        },
        "confusion": {
            "t": 0,
            "label": [label for label, _ in pairs],
            "predicted": [predicted for _, predicted in pairs],
            "samples": list(confusion.values()),
        },
    }


def write_record(run, made):
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{made['name']}.json").write_text(json.dumps(made))
