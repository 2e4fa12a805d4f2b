-- The kit's own rules. Their settings are the section hopthu of rspamd.conf.override.
local logger = require 'rspamd_logger'
local tcp = require 'rspamd_tcp'
local util = require 'rspamd_util'

local NAME = 'hopthu'
local settings = rspamd_config:get_all_opt(NAME)

local function set(list)
  local members = {}
  for _, value in ipairs(list) do
    members[value] = true
  end
  return members
end

local own_domains = set(settings.domains)
local refused_extensions = set(settings.refused_extensions)
local trusted_forwarders = set(settings.trusted_forwarders)

-- The test pattern of all spam filters.
config.regexp['GTUBE_PATTERN'] = {
  re = '/XJS\\*C4JDBQADN1\\.NSBN3\\*2IDNEN\\*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL\\*C\\.34X/{mime}',
  score = 1000,
  group = NAME,
  description = 'The test pattern for spam filters',
}

-- A header by which the sender's side says that this is spam. Anybody can write it.
config.regexp['SPAM_FLAG'] = nil

-- Viruses ----------------------------------------------------------------------------------------------------------
-- Not by Rspamd's antivirus module: it lets a message pass when clamd answers with an error, such as for a full disk.
-- Here a message goes on only when clamd has said so. Whole messages, whoever sends them; nothing is remembered, since
-- what is clean today may be known tomorrow.

local function scan(task)
  local content = task:get_content()
  local request = { 'zINSTREAM\0', util.pack('>I4', #content), content, util.pack('>I4', 0) }

  local function ask(number)
    local server = settings.clamd[number]
    if not server then
      return
    end
    local answered = false
    local function answer(err, data)
      if answered then
        return
      end
      answered = true
      local text = err and '' or tostring(data):gsub('%z', '')
      local virus = text:match('^stream: (.+) FOUND$')
      if text == 'stream: OK' then
        task:insert_result('VIRUS_NONE', 0.0)
      elseif not virus then
        logger.errx(task, 'no virus check at clamd %s: %s', server, err or text)
        ask(number + 1)
      elseif virus:find('^Heuristics%.Encrypted') then
        task:insert_result('VIRUS_ENCRYPTED', 1.0, virus)
      elseif virus:find('^Heuristics%.Limits%.Exceeded') then
        task:insert_result('VIRUS_LIMITS', 1.0, virus)
      else
        task:insert_result('VIRUS_FOUND', 1.0, virus)
      end
    end
    local host, port = server:match('^([^/]+):(%d+)$')
    local sent = tcp.request({
      task = task,
      host = host or server,
      port = tonumber(port or 0),
      timeout = settings.clamd_timeout,
      data = request,
      stop_pattern = '\0',
      callback = answer,
    })
    if not sent then
      answer('no connection')
    end
  end
  ask(1)
end

local id = rspamd_config:register_symbol({
  name = 'VIRUS_CHECK',
  type = 'callback',
  group = NAME,
  flags = 'ignore_passthrough',
  callback = function(task)
    -- What is put off or refused already need not be read.
    local action = task:has_pre_result() and task:get_metric_action()
    if action ~= 'reject' and action ~= 'soft reject' then
      scan(task)
    end
  end,
  augmentations = { string.format('timeout=%f', settings.clamd_timeout * #settings.clamd) },
})
for _, symbol in ipairs({ 'VIRUS_NONE', 'VIRUS_FOUND', 'VIRUS_ENCRYPTED', 'VIRUS_LIMITS' }) do
  rspamd_config:register_symbol({ name = symbol, type = 'virtual', parent = id, score = 0.0, group = NAME })
end

-- What the message says of itself ----------------------------------------------------------------------------------

-- Lower-case addresses of all headers of a name; nil where one holds none that can be read.
local function addresses(task, name)
  local found = {}
  for _, header in ipairs(task:get_header_full(name) or {}) do
    local parsed = util.parse_mail_address(header.value, task:get_mempool())
    if not parsed or not parsed[1] then
      return nil
    end
    for _, address in ipairs(parsed) do
      if not address.addr or address.addr == '' then
        return nil
      end
      found[#found + 1] = address.addr:lower()
    end
  end
  return found
end

-- Whether a part is a Windows program: the header that its first bytes lead to is there. Rspamd takes whatever begins
-- with MZ for one, a text or something encrypted too.
local function is_program(part)
  local content = tostring(part:get_content())
  if #content < 64 then
    return false
  end
  local at = util.unpack('<I4', content:sub(61, 64))
  local header = content:sub(at + 1, at + 4)
  return header == 'PE\0\0' or header:sub(1, 2) == 'NE' or header:sub(1, 2) == 'LE'
end

-- The first attachment whose name, or whose content, is of a kind that is refused; in archives by name.
local function refused_attachment(task)
  local function refused(name)
    -- Windows drops dots and blanks at the end.
    local extension = name and name:lower():gsub('[%s%.]+$', ''):match('%.([%w]+)$')
    return extension and refused_extensions[extension]
  end
  for _, part in ipairs(task:get_parts() or {}) do
    local name = part:get_filename()
    if refused(name) then
      return name
    end
    local kind = part:get_detected_ext()
    if kind and refused_extensions[kind] and (kind ~= 'exe' or is_program(part)) then
      return name or kind
    end
    if part:is_archive() then
      for _, member in ipairs(part:get_archive():get_files(100000)) do
        if refused(member) then
          return member
        end
      end
    end
  end
end

-- Whether forwarders that we trust, and nobody else, have sealed the message since it was authentic. A chain that ends
-- with another's seal proves nothing: he may have changed everything below it.
local function forwarded_by_trusted(task)
  if not task:has_symbol('ARC_ALLOW') then
    return false
  end
  local seals, results = task:cache_get('arc-seals'), task:cache_get('arc-authres')
  if not seals or not results or #seals ~= #results then
    return false
  end
  for _, seal in ipairs(seals) do
    if not trusted_forwarders[(seal.d or ''):lower()] then
      return false
    end
  end
  for _, result in ipairs(results[1].ar or {}) do
    if result.dmarc == 'pass' then
      return true
    end
  end
  return false
end

-- Verdict on the DKIM signatures of a domain: '+' one is good, '?' one could not be checked, nil none.
local function signed_by(task, domain)
  local verdict
  for _, trace in ipairs((task:get_symbol('DKIM_TRACE') or {})[1] and task:get_symbol('DKIM_TRACE')[1].options or {}) do
    local signer, result = trace:match('^(.*):(.)$')
    if signer and signer:lower() == domain and (result == '+' or result == '?') then
      verdict = verdict == '+' and '+' or result
    end
  end
  return verdict
end

-- The decision -----------------------------------------------------------------------------------------------------
-- Looked at for every message, whatever other rules think of it.

-- Officials' mail: under their own address only, in the header too (RFC 5322 3.6.2), and signed.
local function judge_outgoing(task, refuse, defer)
  local envelope = task:get_from('smtp')
  local sender = envelope and envelope[1] and envelope[1].addr:lower() or ''
  if #(task:get_header_full('From') or {}) ~= 1 then
    refuse('From: exactly one is needed')
  end
  for _, name in ipairs({ 'From', 'Sender' }) do
    local found = addresses(task, name)
    if not found then
      refuse(name .. ': holds no address')
    end
    for _, address in ipairs(found or {}) do
      if address ~= sender then
        refuse(name .. ': ' .. address .. ' is not the address you send with')
      end
    end
  end
  if settings.signs and not task:has_symbol('DKIM_SIGNED') then
    logger.errx(task, 'not signed: no usable DKIM key for the sender domain of %s', sender)
    defer('The message cannot be signed now, try again later')
  end
end

-- Strangers' mail: what the domain in From: says about who may use it counts.
local function judge_incoming(task, refuse, defer, junk)
  local forwarded = forwarded_by_trusted(task)
  local from = addresses(task, 'From')
  local own, unsure, author = nil, false, nil
  for _, address in ipairs(from or {}) do
    local domain = address:match('@([^@]+)$') or ''
    local signed = signed_by(task, domain)
    author = author or signed == '+'
    if own_domains[domain] and signed ~= '+' then
      own, unsure = address, signed == '?'
    end
  end
  if own and not forwarded then
    if unsure then
      defer('The signature cannot be checked now, try again later')
    else
      refuse('From: ' .. own .. ' is ours and sends after login only')
    end
  end
  if forwarded then
    return
  end
  if task:has_symbol('DMARC_POLICY_REJECT') then
    refuse('The domain in From: asks to refuse what is not from it (DMARC)')
  elseif task:has_symbol('DMARC_POLICY_QUARANTINE') then
    junk('DMARC quarantine')
  end
  if task:has_symbol('R_SPF_FAIL') and not author then
    if settings.spf_fail == 'refuse' then
      refuse('The sender domain does not send from this address (SPF)')
    else
      junk('SPF fail')
    end
  end
end

rspamd_config:register_symbol({
  name = 'HOPTHU_DECISION',
  type = 'postfilter',
  group = NAME,
  flags = 'empty,ignore_passthrough',
  priority = 10,
  callback = function(task)
    local refused = false
    local function refuse(text)
      if not refused then
        refused = true
        task:set_pre_result('reject', (text:gsub('[^\32-\126]', '?')), NAME, nil, 100)
      end
    end
    local action = task:has_pre_result() and task:get_metric_action()
    if action == 'reject' then
      return
    end
    -- Greylisting or a limit puts it off already; what is to be refused need not come again.
    local put_off = action == 'soft reject'
    local function defer(text)
      if not put_off then
        task:set_pre_result('soft reject', text, NAME, nil, 90)
      end
    end
    local outgoing = task:get_user() ~= nil
    local ip = task:get_from_ip()
    local ours = ip and ip:is_valid() and ip:is_local()
    -- Marked for the folder Junk of whoever gets it; what officials send is not marked.
    local function junk(reason)
      if not outgoing then
        task:set_pre_result('add header', reason, NAME, nil, nil, 'least')
      end
    end

    if task:has_symbol('SENDING_LIMIT') then
      logger.errx(task, 'alarm sending-limit: %s as %s', task:get_user(), (task:get_from('smtp') or { {} })[1].addr)
    end

    local virus = task:get_symbol('VIRUS_FOUND')
    if virus then
      refuse('Virus found: ' .. virus[1].options[1])
    end
    for symbol, policy in pairs({ VIRUS_ENCRYPTED = 'encrypted_archives', VIRUS_LIMITS = 'unscannable' }) do
      local found = task:get_symbol(symbol)
      if found and settings[policy] == 'refuse' then
        refuse('An attachment cannot be checked for viruses: ' .. found[1].options[1])
      elseif found and settings[policy] == 'junk' then
        junk(found[1].options[1])
      end
    end
    if not (virus or task:has_symbol('VIRUS_NONE') or task:has_symbol('VIRUS_ENCRYPTED')
        or task:has_symbol('VIRUS_LIMITS')) then
      defer('The message cannot be checked for viruses now, try again later')
    end

    local attachment = refused_attachment(task)
    if attachment then
      refuse('Attachments of this kind are not accepted: ' .. attachment)
    end
    if outgoing then
      judge_outgoing(task, refuse, defer)
    elseif not ours then
      judge_incoming(task, refuse, defer, junk)
    end
  end,
})
