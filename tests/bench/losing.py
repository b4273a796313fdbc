"""A measuring step that loses its device once, or hangs (`--backend hang`); run by the tests."""

import argparse
import json
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser()
    for name in ("--records", "--backend", "--skip", "--without"):
        parser.add_argument(name)
    arguments, _ = parser.parse_known_args()

    def write(**record):
        with Path(arguments.records).open("a") as file:
            file.write(json.dumps(record) + "\n")

    if arguments.without is None:
        write(kind="device lost", at=2, case="x", provider="broken", error="")
        if arguments.backend == "hang":
            time.sleep(60)
        sys.exit(3)
    assert (arguments.skip, arguments.without) == ("2", "broken")
    write(kind="case", case="x", provider="the rest", status="right")


if __name__ == "__main__":
    main()
