# Sourced by the packaging scripts: what they say, and how they fail.
# shellcheck shell=bash

say() {
    printf '%s\n' "$@"
}

# die MESSAGE [NEXT]: ends the script; NEXT is the command to try.
die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    [[ -z ${2:-} ]] || printf '  next: %s\n' "$2" >&2
    exit 1
}

# usage_error MESSAGE: like die, with the exit status of a wrong command line (sysexits.h).
usage_error() {
    printf '%s: %s\n  next: %s --help\n' "${0##*/}" "$1" "$0" >&2
    exit 64
}

# systemd_runs: the test of sd_booted(3).
systemd_runs() {
    [[ -d /run/systemd/system ]]
}

# carried_environment: the names of the variables that downloads, builds and tests need, one per line; they survive sudo and enter a
# private systemd, and nothing else does.
carried_environment() {
    local download='PIP_.*|(https?|HTTPS?|no|NO|all|ALL)_(proxy|PROXY)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE'
    compgen -e | grep -E "^($download|MMD_COMPILE|MMD_TESTBED|MMD_VLLM_VENV)\$" || true
}

# as_root SCRIPT ARGS...: replaces this process by the same script run by root, when it is not root already.
as_root() {
    ((EUID == 0)) && return
    command -v sudo >/dev/null || die "this must run as root, and there is no sudo" "su -c '$*'"
    exec sudo --preserve-env="$(carried_environment | paste -sd,)" -- "$@"
}
