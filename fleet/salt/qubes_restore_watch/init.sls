# Settings and timer of each place in the pillar:
#
#     qubes_restore_watch:
#       places:
#         nightly:
#           directory: /media/backups
#           passphrase_file: /etc/qubes-restore-svc/watch/nightly.passphrase
#           max_age_days: 8
{% set watch = salt['pillar.get']('qubes_restore_watch', {}) %}
{% set configuration = watch.get('configuration', '/etc/qubes-restore-svc/watch') %}
{% for place, settings in watch.get('places', {}).items() %}
qubes_restore_watch_settings_{{ place }}:
  file.managed:
    - name: {{ configuration }}/{{ place }}.toml
    - makedirs: True
    - dir_mode: '0755'
    - mode: '0644'
    # TOML's texts, numbers and lists are written as JSON's.
    - contents:
{% for key, value in settings.items() %}
      - {{ (key ~ ' = ' ~ value | json) | yaml_dquote }}
{% endfor %}

{% if watch.get('timer', True) %}
qubes_restore_watch_timer_{{ place }}:
  service.running:
    - name: qubes-restore-watch@{{ place }}.timer
    - enable: True
    - require:
      - file: qubes_restore_watch_settings_{{ place }}
{% endif %}
{% endfor %}
