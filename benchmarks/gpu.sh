#!/usr/bin/env bash
# On a machine with a CUDA device: the most telling of the tests marked `gpu`, of which `make test` there runs all, then the
# comparison with other loaders, in under 8 minutes.
#
#   benchmarks/gpu.sh [WHEELS_FOLDER]
#
# WHEELS_FOLDER has wheels of everything that is to be installed, for a machine without a network:
#   pip wheel -w WHEELS_FOLDER '.[gpu]' setuptools && pip download --no-deps -d WHEELS_FOLDER safetensors==0.9.0rc1
# A torch with CUDA that PYTHON has already is used; otherwise it is installed like the rest.
#
# Variables:
#   PYTHON            the interpreter (python3)
#   BUDGET_S          seconds for everything; more of them for more repetitions (470)
#   LARGE_GIGABYTES   size of the checkpoint of large tensors, which must fit the device's memory twice (8.6)
#   SCRATCH           where checkpoints and environments go, on a disk worth measuring (a folder below TMPDIR, kept)
#   OUTPUT            where results go (benchmarks/results/DATE-CARD)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
budget_s=${BUDGET_S:-470}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/weightstream-gpu}
wheels=${1:-}
failures=0

die() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 1
}
step() { printf '\n== %s (%d s of %d s)\n' "$*" "$SECONDS" "$budget_s"; }
left_s() { printf '%d' $((budget_s > SECONDS + 10 ? budget_s - SECONDS : 10)); }

command -v nvidia-smi >/dev/null || die 'there is no nvidia-smi, so no CUDA device: nothing was installed or measured'
cards=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader) || die 'nvidia-smi finds no CUDA device'
[[ -n $cards ]] || die 'nvidia-smi finds no CUDA device'
if [[ -n $wheels ]]; then
    [[ -d $wheels ]] || die "there is no folder $wheels"
    wheels=$(cd "$wheels" && pwd)
fi
"$python" -m pip --version >/dev/null || die "$python has no pip to install with"
printf '%s\n' "$cards"

install() { # ENVIRONMENT REQUIREMENT...
    local environment=$1
    shift
    local options=(--quiet --disable-pip-version-check --no-compile)
    [[ -z $wheels ]] || options+=(--no-index --find-links "$wheels")
    timeout "$(left_s)" "$python" -m pip --python "$environment/bin/python" install "${options[@]}" "$@"
}

own='import sysconfig; print(sysconfig.get_path("purelib"))' # where an environment's packages are
environment() { # ENVIRONMENT FOLDER...: a new one, with the packages of those folders behind its own
    local environment=$1 folder
    shift
    "$python" -m venv --without-pip --clear "$environment"
    for folder in "$@"; do
        printf 'import site; site.addsitedir("%s")\n' "$folder"
    done >"$("$environment/bin/python" -c "$own")/behind.pth"
}

step install
# Where PYTHON's packages are, if its torch is to be used. --system-site-packages would not find them where PYTHON is of an
# environment itself, or where they are the user's.
behind=()
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    mapfile -t behind < <("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
fi
main=$scratch/venv
other=$scratch/venv-prefetch
mkdir -p "$scratch"
environment "$main" "${behind[@]}"
install "$main" 'setuptools>=77'
install "$main" --no-build-isolation -e '.[gpu]' || {
    (($(left_s) > 100)) || die "there is no time left after installing; BUDGET_S=900 gives more"
    printf 'gpu.sh: not everything can be installed; going on without InstantTensor\n' >&2
    install "$main" --no-build-isolation -e '.[bench]' hypothesis pytest pytest-asyncio pytest-timeout
}
"$main/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die 'the torch that is installed finds no CUDA device'

# safetensors 0.9 in an environment that has its own, and the main one's packages behind it.
pythons=()
environment "$other" "$("$main/bin/python" -c "$own")"
if install "$other" --no-deps 'safetensors==0.9.0rc1'; then
    pythons=(--python "prefetch=$other/bin/python")
else
    printf 'gpu.sh: safetensors 0.9.0rc1 cannot be installed; the comparison goes on without its prefetch\n' >&2
fi

step 'tests marked gpu: what only a real device shows'
timeout "$(($(left_s) / 3))" "$main/bin/python" -m pytest -m 'gpu and not soak' -q -p no:cacheprovider \
    tests/fakes/test_contracts.py tests/real tests/test_ceilings.py tests/faults || failures=1

step comparison
options=(--device cuda --caches warm --checkpoints large small --runs 5
    --large-gigabytes "${LARGE_GIGABYTES:-8.6}" --folder "$scratch/checkpoints"
    --arms ws-stream ws-again accelerate-meta preload load-file prefetch instanttensor instanttensor-buffered
    runai fastsafetensors buffered-8 buffered-12 buffered-16 copy)
[[ -z ${OUTPUT:-} ]] || options+=(--output "$OUTPUT")
timeout "$(left_s)" "$main/bin/python" -m benchmarks compare "${options[@]}" "${pythons[@]}" \
    --budget-s "$(($(left_s) - 40))" || failures=1

step 'done'
exit "$failures"
