# core/amalgamate.awk - writes the two-file form of the library: `awk -f core/amalgamate.awk moe.c`.
#
# In: moe.c. Out, on stdout: the same text with every `#include "..."` replaced by the file it
# names. A .c or .h file goes in once, where it is first named; a .def file each time, since it is a
# list that is read with another X each time. moe.h stays an include: it is the second file. A file
# that is missing ends the run with status 1: the output must not be used then.
function dirname(path)
{
    return path ~ /\// ? substr(path, 1, length(path) - length(file_of(path))) : ""
}
function file_of(path)
{
    sub(/.*\//, "", path)
    return path
}
# "core/../quant/x.h" -> "quant/x.h", so that a file has one name.
function normal(path)
{
    while (path ~ /[^\/.]+\/\.\.\//)
        sub(/[^\/.]+\/\.\.\//, "", path)
    return path
}
function put(path, line, name, got)
{
    if (path ~ /\.[ch]$/)
        done[path] = 1
    while ((got = (getline line < path)) > 0) {
        if (line !~ /^[ \t]*#[ \t]*include[ \t]+"/) {
            print line
            continue
        }
        name = line
        sub(/^[^"]*"/, "", name)
        sub(/".*/, "", name)
        name = normal(dirname(path) name)
        if (name == "moe.h") {
            if (!done[name]++)
                print "#include \"moe.h\""
        } else if (!done[name]) {
            print "/* ======== " name " ======== */"
            put(name)
            print "/* ======== end of " name " ======== */"
        }
    }
    close(path)
    if (got < 0) {
        print "amalgamate: cannot read " path > "/dev/stderr"
        failed = 1
        exit 1
    }
}
BEGIN {
    put(ARGV[1])
    exit failed
}
