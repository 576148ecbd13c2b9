"""Pictures of TensorBoard for the README: train on the digits, serve the log, look at it.

    apt-get install chromium chromium-driver
    python docs/screenshots.py docs/images

TensorBoard is served on 127.0.0.1 and looked at by a headless Chromium; both are stopped at the
end. Pictures: schedules overlaid, their heat map, penalties, curves and histograms per update.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WINDOW = (1100, 760)
# Name of the picture -> where it is found in TensorBoard, and what to wait for.
PICTURES = {
    "schedules": (
        "tagFilter=learning_rate_schedule&runFilter=update",
        "scalar-card canvas, scalar-card svg",
    ),
    "heat_map": ("tagFilter=schedules/learning_rate", "image-card img"),
    "penalties": ("tagFilter=inputs/", "image-card img"),
    "scalars": (
        "tagFilter=^outer_loss|hypergradient_norm/[a-z_0-9]*$",
        "scalar-card canvas, scalar-card svg",
    ),
    "histograms": ("tagFilter=^l2/", "histogram-card"),
}
# What TensorBoard keeps in the browser: no settings beside the cards, nothing cut off.
SETTINGS = {
    "ignoreOutliers": False,
    "scalarSmoothing": 0,
    "stepSelectorEnabled": False,
    "timeSeriesSettingsPaneOpened": False,
}
BROWSER = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def train(log_dir: Path, picture: Path, updates: int = 7) -> None:
    """Tune on the digits, TensorBoard's own callback beside ours, and draw what was learned."""
    import keras
    import tensorflow_datasets as tfds

    import keras_drmad as kd

    keras.utils.set_random_seed(0)
    data = Path(__file__).parent.parent / "examples" / "data"
    split = {}
    for name in ("train", "test"):
        x, y = tfds.as_numpy(
            tfds.load("digits", data_dir=data, split=name, as_supervised=True, batch_size=-1)
        )
        split[name] = (x.reshape(len(x), -1) / 16.0, y)
    x, y = split["train"]
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(50, "tanh", name="hidden_1"),
            keras.layers.Dense(50, "tanh", name="hidden_2"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        kd.optimizers.SGD(
            learning_rate=kd.Hyperparameter(0.01, per="layer", over=20),
            momentum=0.9,
            l2=kd.Hyperparameter(1e-4, per="input"),
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callback = kd.DrMADCallback(
        (x[800:], y[800:]),
        outer_optimizer=keras.optimizers.Adam(0.25),
        horizon=4,
        restart=True,
        trajectory="replay",
        log_dir=log_dir,
    )
    board = keras.callbacks.TensorBoard(log_dir)
    past = model.fit(x[:800], y[:800], 40, 4 * updates, verbose=0,
                     validation_data=split["test"], callbacks=[callback, board])  # fmt: skip
    callback.summary()
    history = callback.history
    test_error = [1.0 - past.history["val_accuracy"][record.epoch] for record in history]
    print("test error:", *(f"{error:.1%}" for error in test_error))
    top = [kd.plots.schedules(history)]
    below = [kd.plots.outer_loss(history, test_error), kd.plots.penalties(history, "hidden_1")]
    save_together([top, below], picture)


def save_together(rows: list[list], path: Path) -> None:
    """Save rows of figures as one picture."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    def drawn(figure) -> np.ndarray:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]

    def joined(images: list[np.ndarray], axis: int) -> np.ndarray:
        size = max(image.shape[1 - axis] for image in images)
        padded = []
        for image in images:
            margin = [(0, 0), (0, 0), (0, 0)]
            missing = size - image.shape[1 - axis]
            margin[1 - axis] = (missing // 2, missing - missing // 2)
            padded.append(np.pad(image, margin, constant_values=255))
        return np.concatenate(padded, axis)

    Image.fromarray(joined([joined([drawn(f) for f in row], 1) for row in rows], 0)).save(path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextmanager
def started(command: list[str], says: str, **options) -> Iterator[str]:
    """A program, and what it says about where it is reached; stopped at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    try:
        for line in process.stdout:
            found = re.search(says, line)
            if found:
                yield found.group(1)
                break
        else:
            raise RuntimeError(f"{command[0]} ended without a word of {says!r}")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def request(url: str, body: dict | None = None, method: str | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    ) as answer:
        return json.loads(answer.read())["value"]


@contextmanager
def browser(profile: str) -> Iterator[str]:
    """A headless browser; yields the address of its session (W3C WebDriver)."""
    driver = ["chromedriver", "--port=0"]
    with started(driver, r"started successfully on port (\d+)") as port:
        arguments = [*BROWSER, f"--user-data-dir={profile}", "--window-size={},{}".format(*WINDOW)]
        wanted = {"goog:chromeOptions": {"args": arguments}}
        base = f"http://127.0.0.1:{port}/session"
        session = request(base, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield f"{base}/{session}"
        finally:
            request(f"{base}/{session}", method="DELETE")


def run(session: str, script: str, *arguments) -> object:
    return request(f"{session}/execute/sync", {"script": script, "args": list(arguments)})


def take(session: str, url: str, element: str, path: Path) -> None:
    """Open a page, wait until an element of that kind is drawn, and save the picture."""
    request(f"{session}/url", {"url": "about:blank"})
    request(f"{session}/url", {"url": url})
    end = time.monotonic() + 30
    while not run(session, "return document.querySelectorAll(arguments[0]).length", element):
        if time.monotonic() > end:
            path.write_bytes(base64.b64decode(request(f"{session}/screenshot")))
            raise RuntimeError(f"No {element} at {url}: see {path}")
        time.sleep(0.5)
    time.sleep(4)  # charts are drawn after their elements are there
    path.write_bytes(base64.b64decode(request(f"{session}/screenshot")))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument(
        "--log-dir", type=Path, help="a log that exists already; trains if not given"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp())
    try:
        log_dir = arguments.log_dir
        if log_dir is None:
            log_dir = temporary / "log"
            train(log_dir, arguments.folder / "digits.png")
        board = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir),
                 "--host", "127.0.0.1", "--port", "0", "--reload_interval", "0"]  # fmt: skip
        with (
            started(board, r"at (http://[\d.:]+/)") as url,
            browser(str(temporary / "profile")) as session,
        ):
            time.sleep(3)  # TensorBoard reads the log
            request(f"{session}/url", {"url": url})
            run(session, "localStorage.setItem('_tb_global_settings', arguments[0])",
                json.dumps(SETTINGS))  # fmt: skip
            for name, (query, element) in PICTURES.items():
                where = f"{url}?darkMode=false&{query}#timeseries"
                take(session, where, element, arguments.folder / f"tensorboard_{name}.png")
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
