# Sourced by ../up: the virtual environment in $home. Needs install.sh, messages.sh, steps.sh and `checkout`, the source tree.
# shellcheck shell=bash
# shellcheck source=packaging/lib/install.sh
# shellcheck source=packaging/lib/messages.sh
# shellcheck source=packaging/lib/steps.sh

# What is installed is named by packaging/locks, down to the SHA-256 of each file: the package index is trusted with nothing.
# Code that is not yet known to be the locked one never runs, and code that runs in order to build (setup.py of pystemd and
# sdnotify, of which there are no wheels; setup.py of mmd with mypyc) runs as a user that exists only meanwhile (./builder).
# Root unpacks wheels, whose hash pip has checked, and runs nothing of them.

# $downloads is root's: only files whose hash stands in a lock get there.
builder_home=/var/cache/mmd-build # the builder's, while it runs; in /var/cache/private, see CacheDirectory= in systemd.exec(5)

# source_fingerprint: changes when the installed environment would.
source_fingerprint() {
    (
        cd "$checkout"
        {
            lock_fingerprint
            find mmd pyproject.toml setup.py -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        } | sha256sum | cut -c1-16
    )
}

# lock_fingerprint: changes when the packages would that mmd needs and is built with.
lock_fingerprint() {
    (
        cd "$checkout/packaging/locks"
        { /usr/bin/python3 --version && sha256sum build.txt run.txt sdist.txt; } | sha256sum | cut -c1-16
    )
}

# install_environment: the virtual environment in $home, not editable. The new one is made beside the old and the two are
# exchanged in one step, so that a model that starts meanwhile finds a whole one. Where this fails, the old one stays as it is.
install_environment() {
    local fingerprint locks new=$home.new
    fingerprint=$(source_fingerprint)
    if [[ $(cat "$home/fingerprint" 2>/dev/null) == "$fingerprint" ]]; then
        remark unchanged
        return
    fi
    # In a subshell, a step's: it does not replace the trap of steps.sh.
    trap 'explain_mismatch; rm -rf "$home.new"; remove_builder_home' EXIT
    rm -rf "$new"
    locks=$(lock_fingerprint)
    if [[ $(cat "$home/locks" 2>/dev/null) == "$locks" ]]; then
        cp -a "$home" "$new"
        remark upgraded
    else
        # From the beginning, so that nothing of other locks stays.
        /usr/bin/python3 -m venv --prompt mmd "$new"
        remark installed
    fi
    mkdir "$new/input" # the builder can read it, wherever the checkout is
    (cd "$checkout" && cp -R packaging/lib/builder packaging/locks "$new/input")
    mkdir "$new/input/source"
    (cd "$checkout" && cp -R mmd pyproject.toml setup.py README.md LICENSE "$new/input/source")
    chmod -R u=rwX,go=rX "$new/input"

    [[ $(cat "$downloads/complete" 2>/dev/null) == "$locks" ]] || fetch_packages "$new" "$locks"
    install_packages "$new" "$locks" || {
        rm -f "$downloads/complete" # the next run downloads again
        return 1
    }
    rm -rf "$new/input"
    grep --recursive --files-with-matches --binary-files=without-match --null -F "$new" "$new/bin" "$new/pyvenv.cfg" |
        xargs --null --no-run-if-empty sed -i "s,$new,$home,g"
    # -I: no program of mmd takes modules from its caller's environment or directory.
    sed -i '1s,^#!.*/bin/python[0-9.]*$,& -I,' "$new"/bin/mmd*
    # The generator runs with -B: it would compile its modules at each boot.
    "$new/bin/python" -m compileall -q -s "$new" -p "$home" "$new/lib"
    printf '%s\n' "$locks" >"$new/locks"
    printf '%s\n' "$fingerprint" >"$new/fingerprint"
    exchange "$new" "$home"
    touch "$work/gateway-changed"
}

# explain_mismatch: what pip says of a wrong hash is far above the end of the log, which a step shows: it lists all right ones.
explain_mismatch() {
    local package
    package=$(sed -n '/DO NOT MATCH THE HASHES/{n;s/^ *\([^ ]*\) .*/\1/p;q}' "$work/log")
    [[ -z $package ]] || say "$package DOES NOT MATCH THE HASHES of packaging/locks: it is not the file that was locked. Nothing was installed."
}

# fetch_packages NEW LOCKS: fills $downloads with what the locks name. pip has compared hashes already, but not as root.
fetch_packages() {
    local file sum
    as_builder -- "$1/input/builder" fetch "$1"
    rm -rf "$downloads"
    mkdir -m 0755 "$downloads"
    for file in "$builder_home"/downloads/*; do
        [[ -f $file && ! -L $file ]] || continue
        sum=$(sha256sum <"$file")
        if grep -qrF -- "--hash=sha256:${sum%% *}" "$1/input/locks"; then
            install -m 0644 "$file" "$downloads"
        fi
    done
    printf '%s\n' "$2" >"$downloads/complete"
}

# install_packages NEW LOCKS: what mmd needs, unless NEW is a copy that has it, and mmd itself.
install_packages() {
    local new=$1 kind=mmd wheels=$work/wheels file
    if [[ $(cat "$new/locks" 2>/dev/null) != "$2" ]]; then
        kind=all
        offline_pip "$new" install --no-deps --no-compile --only-binary :all: --find-links "$downloads" \
            --require-hashes --requirement "$checkout/packaging/locks/run.txt" || return
    fi
    as_builder PrivateNetwork=yes -- "$new/input/builder" build "$new" "$downloads" "$kind" || return
    mkdir "$wheels"
    for file in "$builder_home"/wheels/*.whl; do
        [[ ! -f $file || -L $file ]] || cp "$file" "$wheels" || return
    done
    # Built from what was checked, so there is no hash to compare. Of the same version as the one that a copy has: by force.
    offline_pip "$new" install --no-deps --no-compile --force-reinstall "$wheels"/*.whl
}

# offline_pip NEW ARGUMENT...: pip without an index, and without any configuration that could bring one.
offline_pip() {
    PIP_CONFIG_FILE=/dev/null "$1/bin/python" -Im pip --isolated --disable-pip-version-check --no-input "$2" --no-index "${@:3}"
}

# as_builder [PROPERTY...] -- COMMAND...: runs a command as a user that exists only meanwhile, and that may write in $builder_home
# only. When it returns, no process of that user is left, so nobody changes its files while root looks at them.
as_builder() {
    local properties=() variable
    while [[ $1 != -- ]]; do
        properties+=("--property=$1")
        shift
    done
    shift
    # Not --setenv: everybody may read the properties of a unit, and the address of an index or a proxy may hold a password.
    (umask 077 && for variable in $(carried_environment); do quoted "$variable"; done >"$work/environment")
    remove_builder_home
    systemd-run --quiet --wait --pipe --collect --unit=mmd-build.service --description="mmd: packages that are fetched or built" \
        --property=DynamicUser=yes --property=User=mmd-build --property=UMask=0022 \
        --property=CacheDirectory="${builder_home##*/}" --property=WorkingDirectory="$builder_home" \
        --property=EnvironmentFile="$work/environment" --setenv=HOME="$builder_home" \
        --property=PrivateDevices=yes --property=ProtectProc=invisible --property=ProtectKernelTunables=yes \
        --property=ProtectControlGroups=yes --property=CapabilityBoundingSet= --property=RestrictNamespaces=yes \
        --property='RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX' \
        --property='InaccessiblePaths=-/run/mmd -/etc/mmd -/run/dbus/system_bus_socket' \
        "${properties[@]}" -- "$@"
}

# quoted VARIABLE: as a line of an EnvironmentFile=, systemd.exec(5).
quoted() {
    local value=${!1}
    value=${value//\\/\\\\}
    value=${value//\"/\\\"}
    value=${value//\$/\\\$}
    value=${value//\`/\\\`}
    printf '%s="%s"\n' "$1" "$value"
}

# remove_builder_home: what was built there is not used again, unless its hash is known. First ends a builder that outlived its
# packaging/up, which is cut short by Ctrl-C.
remove_builder_home() {
    systemctl --quiet stop mmd-build.service 2>/dev/null || true
    rm -rf "$builder_home" "${builder_home%/*}/private/${builder_home##*/}"
}
