# Sourced by ../up and ../down: what an installation consists of. Needs messages.sh, steps.sh and `checkout`, the source tree.
# shellcheck shell=bash
# shellcheck source=packaging/lib/messages.sh
# shellcheck source=packaging/lib/steps.sh

home=/usr/lib/mmd
manifest=$home.manifest # beside, since $home is exchanged as a whole
downloads=/var/cache/mmd-downloads # what packaging/locks names: ./environment.sh
# What systemd starts for the gateway, which may do none of it; and the watch on the configuration.
helpers=(mmd-reload.path mmd-gpu-probe.socket mmd-registrar.socket mmd-unit-broker.socket mmd-journal.socket)

# exchange NEW OLD: renameat2(2); coreutils of Debian 12 has no command for it.
exchange() {
    if [[ ! -e $2 ]]; then
        mv "$1" "$2"
        return
    fi
    /usr/bin/python3 - "$1" "$2" <<'PYTHON'
import ctypes, os, sys
AT_FDCWD, RENAME_EXCHANGE = -100, 2
libc = ctypes.CDLL(None, use_errno=True)
if libc.renameat2(AT_FDCWD, os.fsencode(sys.argv[1]), AT_FDCWD, os.fsencode(sys.argv[2]), RENAME_EXCHANGE) != 0:
    sys.exit(f"cannot exchange {sys.argv[1]} and {sys.argv[2]}: {os.strerror(ctypes.get_errno())}")
PYTHON
}

# install_files: everything else; what an earlier version installed and this one does not is removed.
install_files() {
    local systemd=/usr/lib/systemd
    : >"$work/manifest"
    put "$systemd/system" "$checkout"/units/*.*
    put "$systemd/user" "$checkout"/units/user/*.*
    put /usr/lib/sysusers.d "$checkout/packaging/sysusers.d/mmd.conf"
    put /usr/lib/tmpfiles.d "$checkout/packaging/tmpfiles.d/mmd.conf"
    put /usr/share/bash-completion/completions "$checkout/packaging/completions/mmdctl.bash"
    put /usr/share/zsh/vendor-completions "$checkout/packaging/completions/_mmdctl"
    put /usr/share/doc/mmd/examples "$checkout"/config/examples/*.yaml
    put_generator "$systemd/system-generators/mmd-generator" 'sys.argv[1:]'
    put_generator "$systemd/user-generators/mmd-generator" '["--user", *sys.argv[1:]]'
    ln -sfn "$home/bin/mmdctl" /usr/bin/mmdctl
    printf '%s\n' /usr/bin/mmdctl >>"$work/manifest"
    put_manuals
    [[ ! -f $manifest ]] || { grep -vxFf "$work/manifest" "$manifest" || true; } | xargs --no-run-if-empty -d '\n' rm -f
    cp "$work/manifest" "$manifest"
    remark "$(wc -l <"$manifest") files"
}

# put DIRECTORY FILE...: copies files that differ.
put() {
    local directory=$1 file target
    shift
    mkdir -p "$directory"
    for file; do
        target=$directory/${file##*/}
        printf '%s\n' "$target" >>"$work/manifest"
        cmp -s "$file" "$target" && continue
        [[ $target != */system/mmd-gateway.service ]] || touch "$work/gateway-unit-changed"
        install -m 0644 "$file" "$target"
    done
}

# put_text FILE LINE...: an executable script.
put_text() {
    mkdir -p "${1%/*}"
    printf '%s\n' "${@:2}" >"$work/script"
    install -m 0755 "$work/script" "$1"
    printf '%s\n' "$1" >>"$work/manifest"
}

# put_generator FILE ARGUMENTS: a script for Python without what makes its start slow: -S, and no collection while it imports.
# -I: neither the caller's environment nor its directory may add to the path of a program that systemd runs as root.
put_generator() {
    local packages
    packages=$("$home/bin/python" -Ic 'import sysconfig; print(sysconfig.get_path("purelib"))')
    put_text "$1" "#!$home/bin/python -ISB" 'import gc, sys' '' 'gc.disable()' "sys.path.append(\"$packages\")" \
        'from mmd.generator import main' '' "sys.exit(main($2))"
}

put_manuals() {
    local source name
    command -v scdoc >/dev/null || return 0
    for source in "$checkout"/man/*.scd; do
        name=${source##*/}
        name=${name%.scd}
        mkdir -p "/usr/share/man/man${name##*.}"
        scdoc <"$source" >"$work/$name"
        put "/usr/share/man/man${name##*.}" "$work/$name"
    done
}

make_users() {
    local old folder
    systemd-sysusers mmd.conf
    # Engines of 0.1.0 owned all of the cache. What one of them left at the place of a model's own folder is not for that model.
    if [[ $(stat --format=%U /var/cache/mmd 2>/dev/null) == mmd-model ]]; then
        chown root:root /var/cache/mmd
        for folder in models private; do
            [[ -e /var/cache/mmd/$folder || -L /var/cache/mmd/$folder ]] || continue
            old=$(mktemp -d /var/cache/mmd/.old.XXXXXX)
            mv -T "/var/cache/mmd/$folder" "$old/$folder"
            rm -rf --one-file-system "$old" || true # engines that still run may be writing there
        done
    fi
    systemd-tmpfiles --create mmd.conf
    remark "mmd, mmd-fetch, mmd-journal, mmd-probe, groups mmd-admin, mmd-model"
}

# default_configuration DEMO: the demonstration, where there is no configuration; nobody's file is overwritten.
default_configuration() {
    local demo=$checkout/config/examples/demo.yaml
    if [[ ! -e /etc/mmd/mmd.yaml ]] && ! compgen -G '/etc/mmd/models.d/*.yaml' >/dev/null; then
        install -m 0644 "$demo" /etc/mmd/mmd.yaml
        remark "/etc/mmd/mmd.yaml: simulated models"
    elif [[ $1 == yes ]] && ! cmp -s "$demo" /etc/mmd/mmd.yaml; then
        say "/etc/mmd holds a configuration of yours, which --demo does not overwrite"
        return 1
    else
        remark "kept /etc/mmd"
    fi
    /usr/bin/mmdctl check
}

# sockets: those that mmd-generator makes of the configuration.
sockets() {
    systemctl list-unit-files --no-legend --plain 'mmd-*.socket' | awk '{print $1}'
}

start_sockets() {
    local units
    systemctl daemon-reload
    mapfile -t units < <(sockets)
    [[ " ${units[*]} " == *" mmd-gateway.socket "* ]] || {
        journalctl --no-pager -n 10 -t mmd-generator
        return 1
    }
    systemctl enable --quiet --now "${helpers[@]}"
    systemctl start "${units[@]}" || {
        journalctl --no-pager -n 10 -o cat "${units[@]/#/--unit=}"
        return 1
    }
    remark "${units[*]}"
}

# renew_gateway: only for new code, and only where it runs. By a fresh process that takes over without a gap; where its unit has
# changed, such as its sandbox, by a restart: requests in flight are finished first, new ones wait. Models go on either way.
renew_gateway() {
    if ! systemctl --quiet is-active mmd-gateway.service; then
        remark "starts with the first request"
    elif [[ -e $work/gateway-unit-changed ]]; then
        systemctl restart mmd-gateway.service
        remark "restarted, the models go on"
    elif [[ -e $work/gateway-changed ]]; then
        systemctl reload mmd-gateway.service
        remark "a fresh process has taken over, the models go on"
    else
        remark "goes on"
    fi
}

# stop_everything: in one call, so that the gateway does not wait for requests whose models stop as well.
stop_everything() {
    local units
    systemctl disable --quiet --now "${helpers[@]}" 2>/dev/null || true
    mapfile -t units < <(systemctl list-units --all --no-legend --plain 'mmd-*' mmd.slice | awk '{print $1}')
    ((${#units[@]} == 0)) || systemctl stop "${units[@]}" || true
    remark "${#units[@]} units"
}

remove_files() {
    [[ ! -f $manifest ]] || xargs -d '\n' rm -f <"$manifest"
    rm -rf "$home" "$home.new" "$manifest" "$downloads" /usr/share/doc/mmd
    rm -rf /run/mmd /run/mmd-model /run/mmd-fetch /run/mmd-sim /run/mmd-gateway
    systemctl daemon-reload
    systemctl reset-failed 'mmd*' 2>/dev/null || true
}

# model_users: those that mmd-user@.service has made: by their names, and in the range of uids that it makes them in (mmd.names).
model_users() {
    getent passwd | awk -F: '$1 ~ /^mmd-m-/ && $3 >= 60578 && $3 <= 60879 {print $1}'
}

purge() {
    local user group
    rm -rf /etc/mmd /var/lib/mmd /var/cache/mmd /etc/systemd/system/mmd-*.d
    # mmd-model: of versions in which all engines had the same user.
    for user in mmd mmd-fetch mmd-journal mmd-probe mmd-model $(model_users); do
        ! getent passwd "$user" >/dev/null || userdel "$user"
    done
    for group in mmd-admin mmd-model; do
        ! getent group "$group" >/dev/null || groupdel "$group"
    done
    systemctl daemon-reload
}
