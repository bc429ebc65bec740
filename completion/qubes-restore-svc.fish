# Completion of qubes-restore-svc for fish. Made by `python -m tests.documents.completion_files` from the parser of the command.
function __qubes_restore_svc_places # how many words are no options, without the one that is written
    set -l places 0
    set -l value 0
    for word in (commandline -opc)[2..]
        if test $value = 1
            set value 0
            continue
        end
        switch $word
            case -p --passphrase-file --memory --jobs -Z --compression-filter --stall-timeout -x --exclude --report --to --volume --with
                set value 1
            case -
                set places (math $places + 1)
            case '-*'
            case '*'
                set places (math $places + 1)
        end
    end
    echo $places
end

complete -c qubes-restore-svc -f
complete -c qubes-restore-svc -n 'test (__qubes_restore_svc_places) = 0' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-svc -n 'test (__qubes_restore_svc_places) = 0' -l version -d 'show what this is and leave'
complete -c qubes-restore-svc -n __fish_use_subcommand -a list -d 'show which qubes a backup holds'
complete -c qubes-restore-svc -n __fish_use_subcommand -a verify -d 'read a backup to its last byte and check it'
complete -c qubes-restore-svc -n __fish_use_subcommand -a extract -d 'restore qubes as disk images and settings in a directory'
complete -c qubes-restore-svc -n __fish_use_subcommand -a compare -d 'compare a backup with what was extracted'
complete -c qubes-restore-svc -n 'test (__qubes_restore_svc_places) = 1' -F
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -s p -l passphrase-file -r -F -d 'read the passphrase from the first line of FILE, or of standard input if it is -'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l memory -x -d 'memory that the worker may use'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l jobs -x -d 'key derivations at once'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -s Z -l compression-filter -x -a 'gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none' -d 'how it is compressed'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l ignore-size-limit -d 'accept disk images that are larger than the backup\'s qubes.xml says'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l ignore-cost-limit -d 'accept keys that take longer to derive than a fast computer\'s backup asks for'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l stall-timeout -x -d 'give up when the backup brings no data for so long'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l no-sandbox -d 'let the worker run without isolation'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -s v -l verbose -d 'say more'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -s q -l quiet -d 'say nothing but errors and warnings'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from list' -l json -d 'print JSON instead of a table'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s p -l passphrase-file -r -F -d 'read the passphrase from the first line of FILE, or of standard input if it is -'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l memory -x -d 'memory that the worker may use'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l jobs -x -d 'key derivations at once'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s Z -l compression-filter -x -a 'gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none' -d 'how it is compressed'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l ignore-size-limit -d 'accept disk images that are larger than the backup\'s qubes.xml says'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l ignore-cost-limit -d 'accept keys that take longer to derive than a fast computer\'s backup asks for'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l stall-timeout -x -d 'give up when the backup brings no data for so long'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l no-sandbox -d 'let the worker run without isolation'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s v -l verbose -d 'say more'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s q -l quiet -d 'say nothing but errors and warnings'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -s x -l exclude -x -d 'leave out this qube, or those that fit, with * and ?'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l skip-dom0-home -d 'leave out dom0\'s home'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l report -r -F -d 'write what happened as JSON'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from verify' -l sha256 -d 'tell the SHA-256 of each volume, which goes over every zero, instead of its fs-verity digest'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s p -l passphrase-file -r -F -d 'read the passphrase from the first line of FILE, or of standard input if it is -'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l memory -x -d 'memory that the worker may use'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l jobs -x -d 'key derivations at once'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s Z -l compression-filter -x -a 'gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none' -d 'how it is compressed'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l ignore-size-limit -d 'accept disk images that are larger than the backup\'s qubes.xml says'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l ignore-cost-limit -d 'accept keys that take longer to derive than a fast computer\'s backup asks for'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l stall-timeout -x -d 'give up when the backup brings no data for so long'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l no-sandbox -d 'let the worker run without isolation'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s v -l verbose -d 'say more'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s q -l quiet -d 'say nothing but errors and warnings'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l to -x -a '(__fish_complete_directories)' -d 'where'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l volume -x -a 'root private home' -d 'with --to -'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l skip-existing -d 'go on where an earlier run stopped'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -s x -l exclude -x -d 'leave out this qube, or those that fit, with * and ?'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l skip-dom0-home -d 'leave out dom0\'s home'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l report -r -F -d 'write what happened as JSON'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from extract' -l sha256 -d 'tell the SHA-256 of each volume, which goes over every zero, instead of its fs-verity digest'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s p -l passphrase-file -r -F -d 'read the passphrase from the first line of FILE, or of standard input if it is -'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l memory -x -d 'memory that the worker may use'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l jobs -x -d 'key derivations at once'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s Z -l compression-filter -x -a 'gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none' -d 'how it is compressed'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l ignore-size-limit -d 'accept disk images that are larger than the backup\'s qubes.xml says'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l ignore-cost-limit -d 'accept keys that take longer to derive than a fast computer\'s backup asks for'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l stall-timeout -x -d 'give up when the backup brings no data for so long'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l no-sandbox -d 'let the worker run without isolation'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s v -l verbose -d 'say more'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s q -l quiet -d 'say nothing but errors and warnings'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l with -x -a '(__fish_complete_directories)' -d 'the directory that `extract` restored to'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -s x -l exclude -x -d 'leave out this qube, or those that fit, with * and ?'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l skip-dom0-home -d 'leave out dom0\'s home'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l report -r -F -d 'write what happened as JSON'
complete -c qubes-restore-svc -n '__fish_seen_subcommand_from compare' -l sha256 -d 'tell the SHA-256 of each volume, which goes over every zero, instead of its fs-verity digest'
