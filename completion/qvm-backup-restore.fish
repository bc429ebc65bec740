# Completion of qvm-backup-restore for fish. Made by `python -m tests.documents.completion_files` from the parser of the command.
function __qvm_backup_restore_places # how many words are no options, without the one that is written
    set -l places 0
    set -l value 0
    for word in (commandline -opc)[2..]
        if test $value = 1
            set value 0
            continue
        end
        switch $word
            case -x --exclude --pool --allow --name --template --netvm --stall-timeout -d --dest-vm -p --passphrase-file -Z --compression-filter --mgmt-template --memory --vcpus --report
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

complete -c qvm-backup-restore -f
complete -c qvm-backup-restore -n 'test (__qvm_backup_restore_places) = 0; and not __fish_contains_opt -s d dest-vm' -F
complete -c qvm-backup-restore -l verify-only -d 'read the backup to its last byte and check it'
complete -c qvm-backup-restore -l compare -d 'compare the backup with the qubes that are here'
complete -c qvm-backup-restore -l resume -d 'go on where an earlier restore of this backup stopped'
complete -c qvm-backup-restore -s x -l exclude -x -d 'leave out this qube, or those that fit, with * and ?'
complete -c qvm-backup-restore -l dom0-home -d 'restore dom0\'s home too, as one unopened archive in a new directory'
complete -c qvm-backup-restore -l skip-dom0-home -d 'do not restore dom0\'s home'
complete -c qvm-backup-restore -l pool -x -d 'storage pool for the restored qubes'
complete -c qvm-backup-restore -l allow -x -d 'let a setting come back this time that the configuration leaves behind'
complete -c qvm-backup-restore -l skip-conflicting -d 'leave out qubes whose names are taken here'
complete -c qvm-backup-restore -l rename-conflicting -d 'restore qubes whose names are taken under other names, with numbers at the end'
complete -c qvm-backup-restore -l name -x -d 'restore the qube OLD under the name NEW'
complete -c qvm-backup-restore -l template -x -d 'base QUBE, or all qubes that miss their template, on this one'
complete -c qvm-backup-restore -l netvm -x -d 'connect QUBE, or all qubes that miss their netvm, to this one, or to none'
complete -c qvm-backup-restore -l skip-broken -d 'leave out qubes whose template or netvm is neither here nor in the backup'
complete -c qvm-backup-restore -l ignore-missing -d 'restore them all the same, with the default template or netvm'
complete -c qvm-backup-restore -l ignore-username-mismatch -d 'restore dom0\'s home even if it is that of another user name'
complete -c qvm-backup-restore -l ignore-size-limit -d 'accept disk images that are larger than the backup\'s qubes.xml says'
complete -c qvm-backup-restore -l ignore-cost-limit -d 'accept keys that take longer to derive than a fast computer\'s backup asks for'
complete -c qvm-backup-restore -l stall-timeout -x -d 'give up when the backup brings no data for so long'
complete -c qvm-backup-restore -s d -l dest-vm -x -d 'the qube that holds the backup'
complete -c qvm-backup-restore -l location-is-service -d 'LOCATION is a qrexec service of that qube, possibly with an argument after a +'
complete -c qvm-backup-restore -s p -l passphrase-file -r -F -d 'read the passphrase from the first line of FILE, or of standard input if it is -'
complete -c qvm-backup-restore -s Z -l compression-filter -x -a 'gzip pigz bzip2 pbzip2 xz lzma zstd zstdmt none' -d 'how it is compressed'
complete -c qvm-backup-restore -l mgmt-vm -d 'let a throw-away qube read the backup'
complete -c qvm-backup-restore -l mgmt-template -x -d 'the disposable template to make it from'
complete -c qvm-backup-restore -l memory -x -d 'its memory, or auto for what there is'
complete -c qvm-backup-restore -l vcpus -x -d 'its virtual processors, or auto for as many as there are'
complete -c qvm-backup-restore -l yes -d 'create the qubes without asking'
complete -c qvm-backup-restore -l report -r -F -d 'write what happened as JSON'
complete -c qvm-backup-restore -l sha256 -d 'tell the SHA-256 of each volume, which goes over every zero, instead of its fs-verity digest'
complete -c qvm-backup-restore -s v -l verbose -d 'say more'
complete -c qvm-backup-restore -s q -l quiet -d 'say less'
complete -c qvm-backup-restore -l paranoid-mode -l plan-b -d 'accepted'
complete -c qvm-backup-restore -l auto-close -d 'accepted'
complete -c qvm-backup-restore -l force-root -d 'accepted'
complete -c qvm-backup-restore -l version -d 'show what this is and leave'
complete -c qvm-backup-restore -s h -l help -d 'show this and leave'
