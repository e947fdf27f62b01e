# Completion of mmdctl(1) for bash. Installed as /usr/share/bash-completion/completions/mmdctl.
# shellcheck shell=bash

_mmdctl() {
    local -A options=(
        [status]="--json -w --watch"
        [list]="--json -q --quiet"
        [show]="--json"
        [requests]="--json"
        [events]="-f --follow -n --lines --json"
        [version]="--json"
        [start]="--no-wait --json"
        [stop]="--all --force --no-wait --json"
        [restart]="--force --no-wait --json"
        [sleep]="--all --force --level --no-wait --json"
        [wake]="--no-wait --json"
        [verify]="--no-wait --json"
        [reset]="--no-wait --json"
        [pin]="--no-wait --json"
        [unpin]="--no-wait --json"
        [cancel]=""
        [add]="--from --replace --start --no-wait --dry-run --json --id --profile --engine --model --venv --gpus --vram --params
            --precision --ram --wake-on-request --no-wake-on-request --pin --no-pin --preload --no-preload --priority --concurrency
            --queue-limit --port --port-protocol
            --restart-on-connection-failure --no-restart-on-connection-failure --description --url --workdir --listen --endpoint
            --alias --arg --env --set"
        [remove]="--force --no-wait --json"
        [check]="-q --quiet --json"
        [config]="--json"
        [reload]=""
        [logs]="--gateway -f --follow -n --lines --since"
        [cat]=""
        [keys]=""
        ["keys add"]="--scope --models --rate --concurrency --json"
        ["keys list"]="--json"
        ["keys revoke"]="--json"
    )
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local command="" choices="-h --help --user --socket" position word
    local -a scope=()
    for ((position = 1; position < COMP_CWORD; position++)); do
        word=${COMP_WORDS[position]}
        case $word in
            --user) scope+=(--user) ;;
            --socket)
                position=$((position + 1))
                scope+=(--socket "${COMP_WORDS[position]}")
                ;;
            -*) ;;
            *)
                if [[ -z $command || $command == keys ]]; then
                    command+=${command:+ }$word
                fi
                ;;
        esac
    done

    case $previous in
        --level) choices="1 2" ;;
        --engine)
            [[ $command == add ]] && choices="vllm sim command external"
            ;;
        --socket | --from | --venv | --workdir)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --scope) choices="use read admin" ;;
        -n | --lines | --since | --rate | --concurrency) return ;;
        *)
            if [[ -z $command ]]; then
                choices+=" --version"
                for word in "${!options[@]}"; do
                    [[ $word == *" "* ]] || choices+=" $word"
                done
            elif [[ $current == -* ]]; then
                choices+=" ${options[$command]-}"
            elif [[ $command == keys ]]; then
                choices="add list revoke"
            elif [[ $command == keys\ * && $previous != --models ]]; then
                return # names of keys are for root alone
            elif [[ $command == check ]]; then
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -f -- "$current")
                return
            elif [[ $command == cancel ]]; then
                while IFS= read -r word; do
                    [[ $word != "$current"* ]] || COMPREPLY+=("${word%% *}")
                done < <(timeout 2 "${COMP_WORDS[0]}" "${scope[@]}" requests 2>/dev/null | tail -n +2)
                return
            elif [[ " add version config reload requests events " != *" $command "* ]]; then
                # Not compgen -W, which would expand what is in a name. A gateway that hangs must not hang the shell.
                while IFS= read -r word; do
                    [[ $word != "$current"* ]] || COMPREPLY+=("$word")
                done < <(timeout 2 "${COMP_WORDS[0]}" "${scope[@]}" list --quiet 2>/dev/null)
                return
            fi
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$current")
}

complete -o nosort -F _mmdctl mmdctl
