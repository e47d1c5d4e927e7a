"""`ummunotify config`: what a compiler has to be told to build C programs with libummunotify."""

from __future__ import annotations

from pathlib import Path

import click

PACKAGE = Path(__file__).parents[1]
INCLUDE = PACKAGE / "include"
LIB = PACKAGE / "lib"


@click.command()
@click.option("--cflags", is_flag=True, help="The directory of the headers.")
@click.option("--libs", is_flag=True, help="The library and its directory.")
@click.option("--pkgconfig", is_flag=True, help="The directory for PKG_CONFIG_PATH.")
def config(cflags: bool, libs: bool, pkgconfig: bool) -> None:
    """Print compiler options for C: cc program.c $(ummunotify config --cflags --libs)."""
    words = []
    if cflags:
        words.append(f"-I{INCLUDE}")
    if libs:
        words += [f"-L{LIB}", f"-Wl,-rpath,{LIB}", "-lummunotify"]
    if pkgconfig:
        words.append(str(LIB / "pkgconfig"))
    if not words:
        raise click.UsageError("give --cflags, --libs or --pkgconfig")
    click.echo(" ".join(words))
