# Completion of qubes-restore-watch for fish. Made by `python -m tests.documents.completion_files` from the parser of the command.
function __qubes_restore_watch_places # how many words are no options, without the one that is written
    set -l places 0
    set -l value 0
    for word in (commandline -opc)[2..]
        if test $value = 1
            set value 0
            continue
        end
        switch $word
            case --configuration --state --stale-after --expect
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

complete -c qubes-restore-watch -f
complete -c qubes-restore-watch -n 'test (__qubes_restore_watch_places) = 0' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-watch -n 'test (__qubes_restore_watch_places) = 0' -l version -d 'show program\'s version number and exit'
complete -c qubes-restore-watch -n __fish_use_subcommand -a verify -d 'verify the newest backup in a place'
complete -c qubes-restore-watch -n __fish_use_subcommand -a show -d 'show what the last checks here found'
complete -c qubes-restore-watch -n __fish_use_subcommand -a collect -d 'show what the last checks of many machines found'
complete -c qubes-restore-watch -n 'test (__qubes_restore_watch_places) = 1' -F
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from verify' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from verify' -l configuration -x -a '(__fish_complete_directories)' -d 'where the settings are'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from verify' -l state -x -a '(__fish_complete_directories)' -d 'where the reports are'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from show' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from show' -l configuration -x -a '(__fish_complete_directories)' -d 'where the settings are'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from show' -l state -x -a '(__fish_complete_directories)' -d 'where the reports are'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from show' -l stale-after -x -d 'a report is too old after so many days'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from collect' -s h -l help -d 'show this help message and exit'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from collect' -l expect -x -d 'a machine that must be among them'
complete -c qubes-restore-watch -n '__fish_seen_subcommand_from collect' -l stale-after -x -d 'a report is too old after so many days'
