"""The directory engine of Hộp Thư.

names   names of people and offices to local parts
files   YAML, CSV and JSON to records that know their line
schema  records to typed policy, units and people
state   cross checks; units and people to the LDAP entries that shall exist
plan    the difference between those entries and the live tree, in a safe order

Only `plan` runs on the managed host. `entries` is apart: slapd's own configuration and fixed tree.
"""
