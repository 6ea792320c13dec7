# tests/join.awk - makes one program of many tests, so that the library is compiled once for all:
#
#   awk -f tests/join.awk tests/test_gguf.c ... tests/*.h convert/*.[ch] >joined.c
#
# The program runs the test whose name it was called by: the Makefile makes a link for each. A test is
# written as if it were alone. A name that two of the files define gets the test's name in front, through
# a #define around the file; its own macros end with it. Only what stands at the beginning of a line is
# looked at: that is where the house style has definitions. What the tests share is included first, with
# no such macro around it; so is the converter, which not all builds have, but after the tests that do
# not use it.

# The name that a definition at the beginning of a line gives to something, or "".
function defined(line,    name) {
    if (line ~ /^} [A-Za-z_][A-Za-z0-9_]*;/) { # typedef struct { ... } NAME;
        sub(/^} /, "", line)
        sub(/;.*/, "", line)
        return line
    }
    if (line !~ /^[A-Za-z_]/ || line ~ /^(int main|#|})/)
        return ""
    if (line ~ /^(typedef )?(struct|enum|union) [A-Za-z0-9_]+ \{/) {
        sub(/^(typedef )?(struct|enum|union) /, "", line)
        sub(/ .*/, "", line)
        return line
    }
    sub(/^.*static /, "", line)
    if (!match(line, /[A-Za-z_][A-Za-z0-9_]*(\(| =|\[|;)/)) # function, variable, array
        return ""
    name = substr(line, RSTART, RLENGTH)
    sub(/[^A-Za-z0-9_].*/, "", name)
    return name
}

function note(file, name) {
    if (name == "" || (file, name) in seen)
        return
    seen[file, name] = 1
    n_files[name]++
    names[file, ++n_names[file]] = name
}

# enum { A, B = 1 }: the names in it.
function note_enum(file, text,    i, n, item) {
    sub(/^.*{/, "", text)
    sub(/}.*/, "", text)
    gsub(/\/\*[^*]*\*\//, "", text)
    n = split(text, item, ",")
    for (i = 1; i <= n; i++) {
        gsub(/^[ \t]+|[ \t]*=.*$|[ \t]+$/, "", item[i])
        note(file, item[i])
    }
}

# Names that a file uses for members: to rename these would be wrong.
function note_members(file, line,    name) {
    while (match(line, /(->|\.)[a-z_][a-z0-9_]*/)) {
        name = substr(line, RSTART, RLENGTH)
        sub(/^(->|\.)/, "", name)
        member[file, name] = 1
        line = substr(line, RSTART + RLENGTH)
    }
}

function base(path) {
    sub(/^.*\//, "", path)
    sub(/\.[ch]$/, "", path)
    return path
}

function read_file(file,    line, in_enum, text) {
    while ((getline line < file) > 0) {
        if (!in_enum && line ~ /^(static |typedef )?enum( [A-Za-z0-9_]+)? \{/) {
            in_enum = 1
            text = ""
        }
        if (in_enum) {
            text = text " " line
            if (line ~ /}/) {
                in_enum = 0
                note_enum(file, text)
            }
        }
        if (line ~ /^#include "\.\.\/convert/) {
            sub(/\.\.\//, "", line)
            with_converter[file] = with_converter[file] line "\n"
        }
        note_members(file, line)
        if (sub(/^#define /, "", line)) {
            sub(/[^A-Za-z0-9_].*/, "", line)
            if (line !~ /^_/)
                macros[file] = macros[file] "#undef " line "\n"
        } else
            note(file, defined(line))
    }
    close(file)
}

function include_test(file,    j, name, rename, end) {
    for (j = 1; j <= n_names[file]; j++) {
        name = names[file, j]
        if (n_files[name] < 2 || ((file, name) in member && !(name in kept))) {
            kept[name] = 1
            continue
        }
        rename = rename "#define " name " " base(file) "_" name "\n"
        end = end "#undef " name "\n"
    }
    if (with_converter[file])
        printf "\n#if !defined MOE_NO_TEXT && !defined MOE_NO_ZSTD\n%s#endif", with_converter[file]
    printf "\n#define main %s_main\n%s#include \"%s\"\n#undef main\n%s%s", base(file), rename, file,
           end, macros[file]
}

BEGIN {
    for (i = 1; i < ARGC; i++) {
        read_file(ARGV[i])
        if (ARGV[i] ~ /^tests\/test_[^\/]*\.c$/)
            test[n_tests++] = ARGV[i]
        else
            for (j = 1; j <= n_names[ARGV[i]]; j++)
                kept[names[ARGV[i], j]] = 1
    }
    # What is local in one test may hide what another has at file scope.
    print "#pragma GCC diagnostic ignored \"-Wshadow\""
    print "#include \"tests/test.h\""
    for (i = 1; i < ARGC; i++)
        if (ARGV[i] ~ /^tests\/.*\.h$/)
            print "#include \"" ARGV[i] "\""
    for (last = 0; last < 2; last++)
        for (i = 0; i < n_tests; i++)
            if ((with_converter[test[i]] != "") == last)
                include_test(test[i])
    print "\nint main(int argc, char **argv)\n{"
    print "    const char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];"
    for (i = 0; i < n_tests; i++)
        print "    if (!strcmp(name, \"" base(test[i]) "\"))\n        return " base(test[i]) \
              "_main(argc, argv);"
    print "    printf(\"no test is called %s\\n\", name);\n    return 1;\n}"
}
