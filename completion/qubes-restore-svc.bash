# Completion of qubes-restore-svc for bash. Made by `python -m tests.documents.completion_files` from the parser of the command.
_qubes_restore_svc_files() { # -f: files, -d: directories
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_qubes_restore_svc() {
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
        -p | --passphrase-file | --memory | --jobs | -Z | --compression-filter | --stall-timeout | -x | --exclude | --report | --to | --volume | --with)
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
    -p | --passphrase-file | --report)
        _qubes_restore_svc_files -f
        return
        ;;
    --to | --with)
        _qubes_restore_svc_files -d
        return
        ;;
    -Z | --compression-filter)
        mapfile -t COMPREPLY < <(compgen -W "gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none" -- "$cur")
        return
        ;;
    --volume)
        mapfile -t COMPREPLY < <(compgen -W "root private home" -- "$cur")
        return
        ;;
    --memory | --jobs | --stall-timeout | -x | --exclude)
        :
        return
        ;;
    esac
    case $command in
        list) options="-h --help -p --passphrase-file --memory --jobs -Z --compression-filter --ignore-size-limit --ignore-cost-limit --stall-timeout --no-sandbox -v --verbose -q --quiet --json" ;;
        verify) options="-h --help -p --passphrase-file --memory --jobs -Z --compression-filter --ignore-size-limit --ignore-cost-limit --stall-timeout --no-sandbox -v --verbose -q --quiet -x --exclude --skip-dom0-home --report --sha256" ;;
        extract) options="-h --help -p --passphrase-file --memory --jobs -Z --compression-filter --ignore-size-limit --ignore-cost-limit --stall-timeout --no-sandbox -v --verbose -q --quiet --to --volume --skip-existing -x --exclude --skip-dom0-home --report --sha256" ;;
        compare) options="-h --help -p --passphrase-file --memory --jobs -Z --compression-filter --ignore-size-limit --ignore-cost-limit --stall-timeout --no-sandbox -v --verbose -q --quiet --with -x --exclude --skip-dom0-home --report --sha256" ;;
        *) options="-h --help --version" ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    elif [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "list verify extract compare" -- "$cur")
    elif [[ $places == 1 && -z $elsewhere ]]; then
        _qubes_restore_svc_files -f
    fi
}
complete -F _qubes_restore_svc qubes-restore-svc
