# Sourced by the packaging scripts: steps with one readable line each.
# shellcheck shell=bash

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# remark TEXT: called by a step, shown at the end of its line.
remark() {
    printf '%s' "$*" >"$work/remark"
}

# step TEXT NEXT COMMAND...: runs one step; when it fails, shows the end of what it printed and what to type next, and ends the
# script. Every step may be run again.
step() {
    local text=$1 next=$2 status
    shift 2
    printf '  %-28s ' "$text"
    : >"$work/remark"
    set +e # a command tested by `if` would go on after its first failure
    (set -e; "$@") >"$work/log" 2>&1
    status=$?
    set -e
    if ((status)); then
        printf 'failed\n'
        tail -n 20 "$work/log" | sed 's/^/    | /'
        printf '  next: %s\n' "$next"
        exit 1
    fi
    printf '%s\n' "$(cat "$work/remark")"
}

# need_packages PACKAGE...: installs those that are missing.
need_packages() {
    local package missing=()
    for package; do
        [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    if ((${#missing[@]})); then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        apt-get install -q -y --no-install-recommends "${missing[@]}"
        remark "installed ${missing[*]}"
    else
        remark "all there"
    fi
}
