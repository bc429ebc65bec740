# Verify the places of the pillar now. The state of a place whose backup is not good fails, and says why.
{% set watch = salt['pillar.get']('qubes_restore_watch', {}) %}
include:
  - qubes_restore_watch

{% for place in watch.get('places', {}) %}
qubes_restore_watch_verify_{{ place }}:
  cmd.run:
    - name: >-
        qubes-restore-watch verify {{ place }}
        --configuration {{ watch.get('configuration', '/etc/qubes-restore-svc/watch') }}
        --state {{ watch.get('state', '/var/lib/qubes-restore-svc/watch') }}
    - require:
      - file: qubes_restore_watch_settings_{{ place }}
{% endfor %}
