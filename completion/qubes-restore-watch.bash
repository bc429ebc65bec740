# Completion of qubes-restore-watch for bash. Made by `python -m tests.documents.completion_files` from the parser of the command.
_qubes_restore_watch_files() { # -f: files, -d: directories
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_qubes_restore_watch() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local word command='' options='' elsewhere='' places=0 index
    COMPREPLY=()
    # A word like --to=DIR comes in three parts.
    if [[ $cur == = ]]; then
        cur=
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        case $word in
        --configuration | --state | --stale-after | --expect)
            index=$((index + 1))
            if [[ ${COMP_WORDS[index]} == = ]]; then index=$((index + 1)); fi
            ;;
        -?*) ;;
        *)
            [[ $command ]] || command=$word
            places=$((places + 1))
            ;;
        esac
    done
    case $prev in
    --configuration | --state)
        _qubes_restore_watch_files -d
        return
        ;;
    --stale-after | --expect)
        :
        return
        ;;
    esac
    case $command in
        verify) options="-h --help --configuration --state" ;;
        show) options="-h --help --configuration --state --stale-after" ;;
        collect) options="-h --help --expect --stale-after" ;;
        *) options="-h --help --version" ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    elif [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "verify show collect" -- "$cur")
    elif [[ $places == 1 && -z $elsewhere ]]; then
        _qubes_restore_watch_files -f
    fi
}
complete -F _qubes_restore_watch qubes-restore-watch
