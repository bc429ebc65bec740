# Completion of qvm-backup-restore for bash. Made by `python -m tests.documents.completion_files` from the parser of the command.
_qvm_backup_restore_files() { # -f: files, -d: directories
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_qvm_backup_restore() {
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
        -d | --dest-vm) elsewhere=1 ;;&
        -x | --exclude | --pool | --allow | --name | --template | --netvm | --stall-timeout | -d | --dest-vm | -p | --passphrase-file | -Z | --compression-filter | --mgmt-template | --memory | --vcpus | --report)
            index=$((index + 1))
            if [[ ${COMP_WORDS[index]} == = ]]; then index=$((index + 1)); fi
            ;;
        -?*) ;;
        *)
            places=$((places + 1))
            ;;
        esac
    done
    case $prev in
    -p | --passphrase-file | --report)
        _qvm_backup_restore_files -f
        return
        ;;
    -Z | --compression-filter)
        mapfile -t COMPREPLY < <(compgen -W "gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none" -- "$cur")
        return
        ;;
    -x | --exclude | --pool | --allow | --name | --template | --netvm | --stall-timeout | -d | --dest-vm | --mgmt-template | --memory | --vcpus)
        :
        return
        ;;
    esac
    case $command in
        *) options="--verify-only --compare --resume -x --exclude --dom0-home --skip-dom0-home --pool --allow --skip-conflicting --rename-conflicting --name --template --netvm --skip-broken --ignore-missing --ignore-username-mismatch --ignore-size-limit --ignore-cost-limit --stall-timeout -d --dest-vm --location-is-service -p --passphrase-file -Z --compression-filter --mgmt-vm --mgmt-template --memory --vcpus --yes --report --sha256 -v --verbose -q --quiet --paranoid-mode --plan-b --auto-close --force-root --version -h --help" ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    elif [[ $places == 0 && -z $elsewhere ]]; then
        _qvm_backup_restore_files -f
    fi
}
complete -F _qvm_backup_restore qvm-backup-restore
