"""Makes the bundled personas: seeded, so that the same command writes the same bytes.

python -m ppg_env.data.make

Values are drawn independently and uniformly for each attribute; two personas of a domain never
share all their facts. 400 a domain: 300 train, 40 validation, 60 test, split by persona.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ppg_env.domains import DOMAINS, Domain

SEED = 20260306
SPLIT_SIZES = {"train": 300, "validation": 40, "test": 60}
NAMES = (
    "Mia Noah Lena Omar Ruth Ivan Aiko Tom Sara Juan Nina Paul Zoe Ali Emma Hugo Lily Max Anna Leo "
    "Eva Sam Ida Ben Maya Karl Rosa Finn Amir June"
).split()


def make_personas(domain: Domain, seed: int = SEED) -> list[dict[str, object]]:
    """Return the persona records of one domain, all facts different."""
    rng = np.random.default_rng([seed, *domain.name.encode()])
    splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
    records: list[dict[str, object]] = []
    seen: set[tuple[str, ...]] = set()
    while len(records) < len(splits):
        facts = {a.name: str(rng.choice(list(a.values))) for a in domain.attributes}
        traits = {name: str(rng.choice(list(values))) for name, values in domain.traits.items()}
        name = str(rng.choice(NAMES))
        key = tuple(facts.values())
        if key in seen:
            continue
        seen.add(key)
        number = len(records)
        records.append(
            {
                "id": f"{domain.name}-{number:04d}",
                "domain": domain.name,
                "name": name,
                "split": splits[number],
                "facts": facts,
                "traits": traits,
            }
        )
    return records


def main() -> None:
    """Write one JSONL file per domain next to this script."""
    for domain in DOMAINS.values():
        path = Path(__file__).parent / f"{domain.name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) for record in make_personas(domain)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(lines)} personas")


if __name__ == "__main__":
    main()
