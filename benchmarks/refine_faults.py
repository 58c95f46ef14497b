"""Whether a refining job is exactly-once: a real model behind our server, a bad way before it, and the job killed.

A model of a hundred thousand parameters is trained for a minute and put behind `davinci serve`. Between it and the
job stands a proxy: a quarter of all requests gets 429 with Retry-After, 500, half an answer, garbled bytes, no answer
in time or a dropped connection, and some questions have answers that never end. With --stream the job's answers come
in pieces, and streams are cut, garbled, or end without being done. `davinci data run` is killed
(SIGKILL) again and again at random moments, by turns with one worker and with two, then left to finish; its corpus
is held against that of a job to which nothing happened but the endless answers.

It proves the protocol. It says nothing of the quality of refined text: this model's words are poor.

figures: identical_output (to the byte), same_answers, calls_used_exactly_once_fraction (of answers on disk),
calls_used_that_are_not_on_disk, untouched_chunks_byte_exact_fraction, asked_again_within_bound (no more questions
answered twice than were on their way when the job was killed), kills, questions, requests, answered_more_than_once
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from tests.darwin import tiny_model
from tests.darwin.refine_trial import as_process, trial


def main() -> None:
    """Run the trial, and write what it came to."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--stream", action="store_true", help="the killed job reads answers in pieces")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="davinci-refine-") as scratch:
        root = Path(scratch)
        run = tiny_model.write_run(root / "model")
        with tiny_model.served(run) as url:
            kills, documents = arguments.kills, arguments.documents
            found = trial(
                root / "job", url, arguments.seed, kills, documents, as_process, stream=arguments.stream
            )
    figures, counts = found["figures"], found["counts"]
    faults = counts.pop("faults")
    common.write(arguments.json, figures | {name: float(value) for name, value in counts.items()}, faults)


if __name__ == "__main__":
    main()
