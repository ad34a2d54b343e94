"""Programs on an emulated Sapphire Rapids: AMX and AVX-512 on any x86-64 machine with Debian's packages.

    python3 tests/amx/emulator.py fetch                 downloads the emulator once; nothing is installed
    python3 tests/amx/emulator.py run [ISA] FILE.cpp    compiles a program, runs it and prints what it printed

The emulator is Debian's Bochs, unpacked with the libraries that it needs into a cache folder: ~/.cache/hybrid-emulator,
or $HYBRID_EMULATOR. A program is freestanding C++ that defines `bool check()` (see bare.h). It lies on a raw disk,
behind a boot sector: no operating system comes between it and the processor. There is one core, 512 MiB of memory and
1 MiB of stack. Only the standard library of Python is used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "cpu_kernels" / "src"
CACHE = Path(os.environ.get("HYBRID_EMULATOR") or Path.home() / ".cache" / "hybrid-emulator")
SUITE = "trixie"  # the first Debian whose Bochs knows AMX
PACKAGES = ("bochs", "bochs-term", "bochsbios", "vgabios")
SECTOR, CYLINDER = 512, 16 * 63 * 512  # bytes; the disk must be whole cylinders
SECONDS = 3600  # after which a program is taken to hang
# Code without an operating system: no libraries, no exceptions, fixed addresses below 4 GiB.
FREESTANDING = [
    "-std=c++17",
    "-ffreestanding",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-threadsafe-statics",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-red-zone",
]


class Unavailable(Exception):
    """The emulator cannot be had on this machine; the text says why and what would help."""


class Failed(AssertionError):
    """The program did not compile or did not end with PASS; the text holds what was printed."""


def fetch() -> None:
    """Download the emulator into the cache folder, unless it is there. Raises Unavailable if it cannot."""
    if _emulator().exists():
        return
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise Unavailable(f"{tool} is missing: the emulator is taken from Debian's packages")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        apt = _private_apt(Path(folder))
        _download(*apt, "update")
        _download(*apt, "--yes", "--download-only", "install", *PACKAGES)
        for package in Path(folder).glob("archives/*.deb"):
            _download("dpkg-deb", "--extract", str(package), f"{folder}/root")
        os.replace(f"{folder}/root", CACHE / "root")


def require() -> None:
    """Raises Unavailable unless programs can be run here."""
    if not _emulator().exists():
        raise Unavailable(f"no AMX emulator in {CACHE}: `python3 tests/amx/emulator.py fetch` downloads it")
    for tool in ("g++", "ld"):
        if not shutil.which(tool):
            raise Unavailable(f"{tool} is missing: programs for the AMX emulator are compiled here")


def _emulator() -> Path:
    return CACHE / "root" / "usr" / "bin" / "bochs-bin"


def _private_apt(folder: Path) -> list[str]:
    """An apt-get that knows of no installed package and keeps all its state in `folder`: it needs no rights."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "archives" / "partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(f"deb [signed-by={_keyring()}] {mirror()} {SUITE} main\n")
    options = {
        "Dir::State": folder,
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "amd64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
    }
    return ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]


def _keyring() -> Path:
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not keyring.exists():
        raise Unavailable(f"{keyring} is missing: install debian-archive-keyring, which vouches for the packages")
    return keyring


def mirror(etc: Path = Path("/etc/apt")) -> str:
    """The address of the first Debian archive that this machine installs from. Raises Unavailable if there is none."""
    for file in (etc / "sources.list.d" / "debian.sources", etc / "sources.list"):
        text = file.read_text() if file.exists() else ""
        for address in re.findall(r"^(?:URIs:|deb(?:\s+\[[^\]]*\])?)\s+(\S+/debian/?)(?:\s|$)", text, re.MULTILINE):
            return str(address)
    raise Unavailable(f"no Debian archive is configured in {etc}: the emulator is one of Debian's packages")


def _download(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise Unavailable(f"the emulator could not be downloaded: {reason}")


def kernel_flags(isa: str) -> list[str]:
    """The compiler flags of an instruction set as CMakeLists.txt has them: what is tested is what ships."""
    variables: dict[str, list[str]] = {}
    common: list[str] = []

    def expand(words: Sequence[str]) -> list[str]:
        known = (variables.get(word[2:-1]) if word.startswith("${") else None for word in words)
        return [flag for word, flags in zip(words, known, strict=True) for flag in ([word] if flags is None else flags)]

    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    for command, words in re.findall(r"\b(set|target_compile_options|add_isa)\(([^()]*)\)", text):
        name, *rest = words.split()
        if command == "set":
            variables[name] = expand(rest)
        elif name == "kernels_${name}":
            common = rest[1:]
        elif command == "add_isa" and name == isa:
            variables["ARGN"] = expand(rest)
            return expand(common)
    raise Failed(f"CMakeLists.txt has no instruction set {isa!r}")


def compile_kernels(isa: str, folder: Path) -> Path:
    """The object file of all kernels of one instruction set, from the source and with the flags that ship."""
    source, target = SOURCES / "instances" / f"{isa}.cpp", folder / f"{isa}.o"
    _compile(source, target, [*kernel_flags(isa), *FREESTANDING])
    return target


def run(program: Path, isa: str = "avx512_bf16", objects: Sequence[Path] = (), defines: Sequence[str] = ()) -> str:
    """Compile `program` for `isa`, link it with `objects`, run it and return what it printed.

    Raises Failed if the last line is not PASS, Unavailable if the emulator cannot be had.
    """
    require()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*kernel_flags(isa), *FREESTANDING, *(f"-D{define}" for define in defines)]
        sources = (HERE / "boot.S", HERE / "bare.cpp", HERE / "tile_products.cpp", program)
        for source in sources:
            _compile(source, folder / f"{source.stem}.o", flags if source.suffix == ".cpp" else [])
        parts = [folder / f"{source.stem}.o" for source in sources]
        return _boot(_link([*parts, *objects], folder), folder)


def _compile(source: Path, target: Path, flags: Sequence[str]) -> None:
    includes = (f"-I{HERE}", f"-I{SOURCES}")
    _build("g++", *flags, *includes, "-c", str(source), "-o", str(target))


def _build(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _link(objects: Sequence[Path], folder: Path) -> Path:
    """A raw disk of whole cylinders that starts the program."""
    disk = folder / "disk.img"
    script = ("--oformat=binary", "--no-warn-rwx-segments", "-z", "noexecstack", f"--script={HERE / 'disk.ld'}")
    _build("ld", *script, "-o", str(disk), *map(str, objects))
    os.truncate(disk, -(-disk.stat().st_size // CYLINDER) * CYLINDER)
    return disk


def _boot(disk: Path, folder: Path) -> str:
    root = CACHE / "root"
    libraries, printed = root / "usr/lib/x86_64-linux-gnu", folder / "printed.txt"
    machine = {
        # Without amx_int8: see tile_products.cpp.
        "cpu": "model=sapphire_rapids, exclude_features=amx_int8, count=1, ips=50000000, reset_on_triple_fault=0",
        "memory": "guest=512, host=512",
        "romimage": f"file={root}/usr/share/bochs/BIOS-bochs-latest",
        "vgaromimage": f"file={root}/usr/share/bochs/VGABIOS-lgpl-latest",
        "ata0-master": f"type=disk, path={disk}, mode=flat",
        "boot": "disk",
        "com1": f"enabled=1, mode=file, dev={printed}",
        "display_library": "term",
        "log": f"{folder}/log.txt",
        "panic": "action=fatal",
    }
    (folder / "machine.txt").write_text("".join(f"{name}: {value}\n" for name, value in machine.items()))
    loader = [f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", str(libraries)]
    environment = os.environ | {"LTDL_LIBRARY_PATH": f"{libraries}/bochs/plugins", "TERM": "xterm"}
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        subprocess.run(
            [*loader, str(_emulator()), "-q", "-f", f"{folder}/machine.txt"], env=environment, timeout=SECONDS, **quiet
        )
        ended = "the emulator stopped"
    except subprocess.TimeoutExpired:
        ended = f"the program took more than {SECONDS} s"
    text = printed.read_text(errors="replace").replace("\r", "") if printed.exists() else ""
    if text.endswith("PASS\n"):
        return text
    if text.endswith("FAIL\n"):
        raise Failed(text)
    log = (folder / "log.txt").read_text(errors="replace") if (folder / "log.txt").exists() else ""
    raise Failed(f"{ended} after printing {text!r}; its log ends with\n{log[-1500:]}")


def main(arguments: Sequence[str]) -> int:
    try:
        match arguments:
            case ["fetch"]:
                fetch()
                print(f"the emulator is in {CACHE}")
            case ["run", *isa, program]:
                with tempfile.TemporaryDirectory() as folder:
                    chosen = [compile_kernels(isa[0], Path(folder))] if isa else []
                    defines = [f"KERNELS=kernels_{isa[0]}"] if isa else []
                    print(run(Path(program), *isa[:1], objects=chosen, defines=defines), end="")
            case _:
                print(__doc__)
                return 2
    except (Unavailable, Failed) as error:
        print(error, file=sys.stderr)
        return 77 if isinstance(error, Unavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
