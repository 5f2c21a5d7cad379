# Sourced by quickstart.sh and test.sh, from the repository's root: the virtual environment that both use.

VENV=.venv
VENV_PYTHON=$VENV/bin/python

supported() { # COMMAND: does it run a Python that this project supports?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

make_environment() {
    if [ -x "$VENV_PYTHON" ]; then
        supported "$VENV_PYTHON" && return
        echo "error: $VENV holds $("$VENV_PYTHON" --version 2>&1), and 3.11, 3.12 or 3.13 is needed: remove $VENV and try again" >&2
        exit 1
    fi
    local python
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$python"; then
            echo "making $VENV with $("$python" --version)"
            if ! "$python" -m venv "$VENV"; then
                rm -rf "$VENV"
                echo "error: $python cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)" >&2
                exit 1
            fi
            return
        fi
    done
    local found
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo missing)
    echo "error: Python 3.11, 3.12 or 3.13 is needed, and ${PYTHON:-python3} is $found" >&2
    echo "  hint: install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 1
}

install_packages() { # NAME PIP_OPTION PACKAGE...: once, and again when what it depends on has changed
    local stamp=$VENV/.installed-$1
    local wanted
    wanted="$PWD ${*:2} $(cat setup.py pyproject.toml | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing $1 into $VENV (a few minutes the first time)"
    if ! "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check "${@:2}"; then
        echo "error: pip could not install ${*:3}; its messages are above. Run this again, or remove $VENV first." >&2
        exit 1
    fi
    echo "$wanted" > "$stamp"
}
